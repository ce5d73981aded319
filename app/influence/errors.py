"""What can go wrong in the science, as one tree.

    HeadwaterError
    ├── RowError        a training row that cannot be used
    ├── QueryError      a generation that cannot be attributed
    ├── ModelError      a folder that is not a model we load
    ├── SpecError       an index asked for with impossible settings
    ├── IndexMissing    no manifest where an index should be
    ├── IndexCorrupt    a shard whose bytes are not those that were written
    ├── FactorsMissing  no EK-FAC factors where a query asks for them
    ├── FactorsCorrupt  EK-FAC factors whose bytes are not those that were written
    ├── ShardsMissing   shards that no machine holds at the moment
    ├── BuildersMissing no machine to compute a shard on at the moment
    ├── Mismatch        a model that the index was not built from
    └── DiskFull        no room left while writing

Each carries the field (or file) at fault and one sentence that says what to do. The service turns them into
problem+json in one place.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any


class HeadwaterError(Exception):
    """`detail` says what is wrong and what to do; `field` names the input at fault, if there is one."""

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class RowError(HeadwaterError):
    """A bad training row; `line` is its 1-based line or record number in the file it came from."""

    def __init__(self, detail: str, *, field: str | None = None, line: int | None = None) -> None:
        super().__init__(detail if line is None else f"line {line}: {detail}", field=field)
        self.line = line


class QueryError(HeadwaterError):
    """A generation that cannot be attributed: empty, too long, or a span outside it."""


class ModelError(HeadwaterError):
    """Not a model folder, pickled weights only, non-finite weights, or an adapter that does not fit."""


class SpecError(HeadwaterError):
    """An index specification that cannot be built."""


class IndexMissing(HeadwaterError):
    """There is no finished index at that path."""


class IndexCorrupt(HeadwaterError):
    """A shard that is missing, truncated or altered; `shard` names it."""

    def __init__(self, detail: str, *, shard: str) -> None:
        super().__init__(detail, field="index")
        self.shard = shard

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes."""
        return partial(IndexCorrupt, self.detail, shard=self.shard), ()


class FactorsMissing(HeadwaterError):
    """The index has no EK-FAC factors, or none of the model as it is."""


class FactorsCorrupt(HeadwaterError):
    """EK-FAC factors that are missing, truncated or altered; `file` names them."""

    def __init__(self, detail: str, *, file: str) -> None:
        super().__init__(detail, field="rerank")
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes."""
        return partial(FactorsCorrupt, self.detail, file=self.file), ()


class ShardsMissing(HeadwaterError):
    """No machine of the cluster holds these shards at the moment: without them there is no whole answer."""

    def __init__(self, shards: Sequence[str]) -> None:
        super().__init__(f"no node holds shard {', '.join(shards)} at the moment; try again shortly", field="index")
        self.shards = tuple(shards)


class BuildersMissing(HeadwaterError):
    """No machine of the cluster has room for a builder, or builder after builder died."""


class Mismatch(HeadwaterError):
    """The model is not the one that the index was built from.

    `differs` maps each hash that differs to (the index's, the model's).
    """

    def __init__(self, detail: str, *, field: str | None = "model", differs: dict[str, tuple[str, str]]) -> None:
        super().__init__(detail, field=field)
        self.differs = differs

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes."""
        return partial(Mismatch, self.detail, field=self.field, differs=self.differs), ()


class DiskFull(HeadwaterError):
    """No room left on the disk; what was finished before is kept and a retry goes on from there."""


@contextmanager
def disk_full_is_named(what: str) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT, which libraries wrap in errors of their own, into `DiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full while writing {what}; free some space and run the job again") from error
        raise
