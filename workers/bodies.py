"""Which body runs which kind of job: the one list that a worker process and the embedded worker share."""

from collections.abc import Mapping
from pathlib import Path

from app.catalog.database import Database
from app.catalog.types import JobKind
from app.jobs.compute import Compute
from app.jobs.runner import Body
from workers.build_index import AppendSamples, BuildIndex, RepairIndex
from workers.engines import Engine
from workers.fit_ekfac import FitEkfac
from workers.unlearn import Unlearn
from workers.value import Value


def make_bodies(
    database: Database, compute: Compute, engine: Engine, indexes_dir: Path, artifacts_dir: Path
) -> Mapping[JobKind, Body]:
    """The body of each kind."""
    return {
        JobKind.BUILD_INDEX: BuildIndex(database, compute, engine, indexes_dir),
        JobKind.APPEND_SAMPLES: AppendSamples(database, compute, engine, indexes_dir),
        JobKind.REPAIR_INDEX: RepairIndex(database, compute, engine, indexes_dir),
        JobKind.FIT_EKFAC: FitEkfac(database, compute, engine, indexes_dir),
        JobKind.UNLEARN: Unlearn(compute, indexes_dir, artifacts_dir),
        JobKind.VALUATION: Value(database, compute, indexes_dir, artifacts_dir),
    }
