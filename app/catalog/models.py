"""The repository of models."""

from sqlalchemy import delete, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.catalog.errors import AlreadyExists, Conflict, NotFound
from app.catalog.pages import Page, newest_first
from app.catalog.tables import IndexRow, Job, Model
from app.catalog.types import JobState

ACTIVE = (JobState.QUEUED, JobState.RUNNING)


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

    async def require_free(self, name: str, field: str = "name", but: str | None = None) -> None:
        """Raise when the name is taken, or an unfinished job (`but` this one) will register its model under it."""
        if await self._session.scalar(select(Model.id).where(Model.name == name)):
            raise AlreadyExists(f"a model named {name!r} exists already", field=field)
        others = select(Job.id).where(Job.makes_model == name, Job.state.in_(ACTIVE), Job.id != (but or ""))
        job = await self._session.scalar(others)
        if job is not None:
            raise AlreadyExists(f"job {job} will register a model named {name!r}", field=field)

    async def add(self, model: Model, made_by: str | None = None) -> None:
        """Store a new model; `made_by` is the job that reserved its name, if one did."""
        await self.require_free(model.name, but=made_by)
        self._session.add(model)
        await self._session.flush()

    async def remove(self, model: Model) -> None:
        """Forget a model; its files stay where they are.

        Raises:
            Conflict: an index was built from it, or an unfinished job works on it.
        """
        job = await self._session.scalar(select(Job.id).where(Job.model_id == model.id, Job.state.in_(ACTIVE)).limit(1))
        if job is not None:
            raise Conflict(f"job {job} works on model {model.name!r}: wait for it or cancel it", field="model")
        index = await self._session.scalar(select(IndexRow.name).where(IndexRow.model_id == model.id).limit(1))
        if index is not None:
            raise Conflict(f"model {model.name!r} is in use by index {index!r}: delete that first", field="model")
        await self._session.execute(delete(Model).where(Model.id == model.id))

    async def page(self, limit: int, cursor: str | None) -> Page[Model]:
        """Models, newest first."""
        return await newest_first(self._session, Model, limit=limit, cursor=cursor)
