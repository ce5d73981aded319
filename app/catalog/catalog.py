"""Catalog: the repositories over one session."""

from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.api_keys import ApiKeys
from app.catalog.datasets import Datasets
from app.catalog.indexes import Indexes
from app.catalog.jobs import Jobs
from app.catalog.keys import Keys
from app.catalog.models import Models
from app.catalog.tables import IndexRow
from app.catalog.tasks import Tasks
from app.catalog.valuations import Valuations


class Catalog:
    """What exists, as one unit of work sees it. Nothing is kept until `commit`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self.models = Models(session)
        self.datasets = Datasets(session)
        self.indexes = Indexes(session)
        self.jobs = Jobs(session)
        self.tasks = Tasks(session)
        self.valuations = Valuations(session)
        self.keys = Keys(session)
        self.api_keys = ApiKeys(session)

    async def refresh(self, index: IndexRow) -> None:
        """Read an index again, after a change that went past the object."""
        await self._session.refresh(index)

    async def commit(self) -> None:
        """Keep what was changed."""
        await self._session.commit()
