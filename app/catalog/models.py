"""The repository of models."""

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.errors import AlreadyExists, NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import Model


class Models:
    """Registered models."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def get(self, ref: str) -> Model:
        """The model with that id or name."""
        found = (await self._session.scalars(select(Model).where(or_(Model.id == ref, Model.name == ref)))).first()
        if found is None:
            raise NotFound(f"there is no model {ref!r}", field="model")
        return found

    async def require_free(self, name: str) -> None:
        """Raise when the name is taken."""
        if await self._session.scalar(select(Model.id).where(Model.name == name)):
            raise AlreadyExists(f"a model named {name!r} exists already", field="name")

    async def add(self, model: Model) -> None:
        """Store a new model."""
        await self.require_free(model.name)
        self._session.add(model)
        await self._session.flush()

    async def page(self, limit: int, cursor: str | None) -> Page[Model]:
        """Models, newest first."""
        return await newest_first(self._session, Model, limit=limit, cursor=cursor)
