"""Operations as methods of the clients: blocking or to be awaited, an answer, pages, or a job."""

import functools
import inspect
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from headwater_client._core import Core, iterate, run
from headwater_client._operations import Call, Operation
from headwater_client.jobs import AsyncJob, Job
from headwater_client.models import Answer, JobInfo, Page

P = ParamSpec("P")
T = TypeVar("T")
Made = TypeVar("Made")


class Owner(Protocol):
    """A client, or a part of one."""

    @property
    def core(self) -> Core:
        """How it calls."""


TakenAs = TypeVar("TakenAs", bound=Answer)


class Described(Generic[P, T]):
    """A method that is an operation; it has the operation's signature and words."""

    def __init__(self, operation: Operation[P, T]) -> None:
        self.operation = operation
        self.__doc__ = operation.build.__doc__
        self._signature = _spelt_out(operation.build)

    def _named(self, call: Any) -> Any:
        functools.update_wrapper(call, self.operation.build)
        call.__signature__ = self._signature
        return call


def _spelt_out(build: Callable[..., Any]) -> inspect.Signature:
    """The signature with each field of a request by its name, so that a notebook can complete it."""
    signature = inspect.signature(build)
    parameters: list[inspect.Parameter] = []
    for one in signature.parameters.values():
        if one.kind is not one.VAR_KEYWORD:
            parameters.append(one)
            continue
        (fields,) = typing.get_args(one.annotation)
        parameters += [
            inspect.Parameter(name, one.KEYWORD_ONLY, default=None, annotation=hint)
            for name, hint in typing.get_type_hints(fields).items()
        ]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)


class Blocking(Described[P, T]):
    """Returns the answer."""

    def __get__(self, owner: Owner, _kind: type[Any]) -> Callable[P, T]:
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return run(owner.core.call(self.operation(*args, **kwargs)))

        named: Callable[P, T] = self._named(call)
        return named


class Awaiting(Described[P, T]):
    """Returns the answer when it is awaited."""

    def __get__(self, owner: Owner, _kind: type[Any]) -> Callable[P, Coroutine[Any, Any, T]]:
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            return await owner.core.call(self.operation(*args, **kwargs))

        named: Callable[P, Coroutine[Any, Any, T]] = self._named(call)
        return named


class Paging(Described[P, Page[T]]):
    """Iterates over the items of all pages."""

    def __get__(self, owner: Owner, _kind: type[Any]) -> Callable[P, Iterator[T]]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
            return iterate(owner.core.pages(self.operation(*args, **kwargs)))

        named: Callable[P, Iterator[T]] = self._named(call)
        return named


class AwaitingPages(Described[P, Page[T]]):
    """Iterates over the items of all pages, with `async for`."""

    def __get__(self, owner: Owner, _kind: type[Any]) -> Callable[P, AsyncIterator[T]]:
        def call(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
            return owner.core.pages(self.operation(*args, **kwargs))

        named: Callable[P, AsyncIterator[T]] = self._named(call)
        return named


def info_of(accepted: Answer) -> JobInfo:
    """The job that was accepted."""
    job = accepted if isinstance(accepted, JobInfo) else getattr(accepted, "job", None)
    assert isinstance(job, JobInfo), "only operations that start a job are `Submitting`"
    return job


class Submitting(Described[P, TakenAs], Generic[P, TakenAs, Made]):
    """Returns the job; `made` fetches what it made."""

    def __init__(self, operation: Operation[P, TakenAs], made: Callable[[JobInfo], Call[Made]]) -> None:
        super().__init__(operation)
        self._made = made

    def __get__(self, owner: Owner, _kind: type[Any]) -> Callable[P, Job[TakenAs, Made]]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Job[TakenAs, Made]:
            accepted = run(owner.core.call(self.operation(*args, **kwargs)))
            return Job(owner.core, accepted, info_of(accepted), self._made)

        named: Callable[P, Job[TakenAs, Made]] = self._named(call)
        return named


class AwaitingSubmission(Described[P, TakenAs], Generic[P, TakenAs, Made]):
    """Returns the job when it is awaited; `made` fetches what it made."""

    def __init__(self, operation: Operation[P, TakenAs], made: Callable[[JobInfo], Call[Made]]) -> None:
        super().__init__(operation)
        self._made = made

    def __get__(self, owner: Owner, _kind: type[Any]) -> Callable[P, Coroutine[Any, Any, AsyncJob[TakenAs, Made]]]:
        async def call(*args: P.args, **kwargs: P.kwargs) -> AsyncJob[TakenAs, Made]:
            accepted = await owner.core.call(self.operation(*args, **kwargs))
            return AsyncJob(owner.core, accepted, info_of(accepted), self._made)

        named: Callable[P, Coroutine[Any, Any, AsyncJob[TakenAs, Made]]] = self._named(call)
        return named
