"""The repository of models."""

from sqlalchemy import delete, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.errors import AlreadyExists, Conflict, NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import IndexRow, Model


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

    async def remove(self, model: Model) -> None:
        """Forget a model; its files stay where they are.

        Raises:
            Conflict: an index was built from it.
        """
        index = await self._session.scalar(select(IndexRow.name).where(IndexRow.model_id == model.id).limit(1))
        if index is not None:
            raise Conflict(f"model {model.name!r} is in use by index {index!r}: delete that first", field="model")
        await self._session.execute(delete(Model).where(Model.id == model.id))

    async def page(self, limit: int, cursor: str | None) -> Page[Model]:
        """Models, newest first."""
        return await newest_first(self._session, Model, limit=limit, cursor=cursor)
