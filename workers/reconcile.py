"""What the catalog says against what is there: jobs, tasks, shards and files, after a crash or a move of the data.

The catalog is the truth about what should be, the disk about what is. What can be put right is: tasks are taken back
from workers that are gone, work that was lost is queued again, an index whose files are newer than the catalog knows is
published, leftovers go. What cannot is said: an index whose files are missing or altered is marked as corrupt.
"""

import asyncio
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from app.catalog.database import Database
from app.catalog.tables import IndexRow, Task
from app.influence.building import missing_parts
from app.influence.errors import IndexCorrupt, IndexMissing
from app.influence.index import curvature_damaged, damaged, open_index, read_manifest, remove_parts
from app.jobs.service import JobService, Swept
from workers.build_index import GRADIENTS, part_of_task

log = structlog.get_logger(__name__)
SUBMISSION_S = 3600.0  # longer than any request takes


@dataclass
class Found:
    """What a reconciliation found, and put right as far as it could."""

    swept: Swept
    tasks_without_files: list[str] = field(default_factory=list)  # done, but to be done again
    indexes_published: list[str] = field(default_factory=list)  # the files were newer than the catalog
    indexes_damaged: list[str] = field(default_factory=list)  # now corrupt: a repair helps
    indexes_unseen: list[str] = field(default_factory=list)  # all of them: this is not their disk, nothing is marked
    folders_removed: list[str] = field(default_factory=list)  # of indexes and jobs that are no more
    folders_unknown: list[str] = field(default_factory=list)  # left alone: this may be the wrong catalog

    @property
    def anything(self) -> bool:
        """Whether there was something to put right."""
        found = asdict(self)
        found.update(found.pop("swept"), jobs=0)
        return any(found.values())


async def reconcile(database: Database, jobs: JobService, indexes_dir: Path, artifacts_dir: Path) -> Found:
    """Compare, put right, and log what was found."""
    found = Found(await jobs.recover())
    await _folders(database, indexes_dir, artifacts_dir, found)
    await _tasks(database, indexes_dir, found)
    await _indexes(database, indexes_dir, found)
    say = log.warning if found.anything else log.info
    say("reconciled", **{name: value for name, value in asdict(found).items() if value})
    return found


async def _folders(database: Database, indexes_dir: Path, artifacts_dir: Path, found: Found) -> None:
    """Remove what a crash in the middle of a deletion or a submission left: folders that the catalog does not know.

    A catalog without a model has made none of them: then this is the wrong database, and nothing is touched. The files
    of a job are there before its row is; a folder so young may be that of a job which is submitted at this moment.
    """

    def look() -> list[Path]:
        settled = [one for one in artifacts_dir.glob("job_*") if time.time() - one.stat().st_mtime > SUBMISSION_S]
        return [*indexes_dir.glob("idx_*"), *settled]

    folders = await asyncio.to_thread(look)  # first: a new index may come between
    async with database.catalog() as catalog:
        indexes, models = await catalog.indexes.ids(), await catalog.models.page(1, None)
        known = indexes | await catalog.jobs.known(folder.name for folder in folders)
    for folder in folders:
        if folder.name in known:
            continue
        if models.items:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            found.folders_removed.append(folder.name)
        else:
            found.folders_unknown.append(folder.name)


async def _tasks(database: Database, indexes_dir: Path, found: Found) -> None:
    """Queue every task of an unfinished job again that is done, but whose shard is not there."""
    async with database.catalog() as catalog:
        done = await catalog.tasks.done(GRADIENTS)
    by_job: dict[tuple[str, str], list[Task]] = {}
    for index_id, task in done:
        by_job.setdefault((index_id, task.job_id), []).append(task)
    for (index_id, job_id), tasks in by_job.items():
        parts = {part_of_task(task): task.number for task in tasks}
        gone = await asyncio.to_thread(missing_parts, indexes_dir / index_id, list(parts))
        numbers = [parts[part] for part in gone]
        if numbers:
            async with database.catalog() as catalog:
                if await catalog.jobs.lock(job_id) and await catalog.tasks.undo(job_id, numbers):
                    await catalog.commit()
                    found.tasks_without_files += [f"{job_id}:{number}" for number in numbers]


async def _indexes(database: Database, indexes_dir: Path, found: Found) -> None:
    """Compare the files of each ready index on which nobody works with what the catalog says of it."""
    async with database.catalog() as catalog:
        indexes = await catalog.indexes.idle()
    there = await asyncio.to_thread(lambda: [index for index in indexes if (indexes_dir / index.id).is_dir()])
    if indexes and not there:
        found.indexes_unseen = [index.id for index in indexes]
        return
    for index in indexes:
        path = indexes_dir / index.id
        try:
            newer = await asyncio.to_thread(_look, path, index)
        except (IndexCorrupt, IndexMissing) as error:
            found.indexes_damaged.append(index.id)
            async with database.catalog() as catalog:
                await catalog.indexes.damaged(index.id, error.detail)
                await catalog.commit()
            continue
        if newer is not None:
            found.indexes_published.append(index.id)
            async with database.catalog() as catalog:
                await catalog.indexes.published(index.id, *newer)
                await catalog.commit()


def _look(path: Path, index: IndexRow) -> tuple[int, dict[str, Any]] | None:
    """Rows and manifest of an index whose files the catalog does not know; None if they agree."""
    manifest = read_manifest(path)
    bad = [shard["name"] for shard in manifest.shards if damaged(path, shard, verify=False)]
    if bad:
        raise IndexCorrupt(f"{_few(bad)} not what was written (missing, or another size): repair it", shard=bad[0])
    if manifest.curvature is not None and curvature_damaged(path, manifest, verify=False):
        name = manifest.curvature["name"]
        raise IndexCorrupt(f"{name} is not what was written (missing, or another size): repair it", shard=name)
    remove_parts(path)
    if manifest.to_dict() == index.manifest:
        return None
    return open_index(path, verify=False).rows, manifest.to_dict()


def _few(names: Sequence[str]) -> str:
    return f"shard {names[0]} is" if len(names) == 1 else f"{len(names)} shards, among them {names[0]}, are"
