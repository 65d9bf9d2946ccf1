"""The pipeline of a release, and the executors that run it here or on a cluster."""

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from loguru import logger

from belle.release import EXACT_DUPLICATES, NEAR_DUPLICATES
from belle.release.blocks import (
    ConversationFilters,
    ReadRecords,
    ReadShards,
    Source,
    WriteShards,
)
from belle.release.duplicates import EXACT, MOST_TASKS, NEAR, ComparePairs, Signatures
from belle.release.filters import Filter
from belle.release.publish import Publish, WriteKept
from gptq.errors import UserError

EXECUTORS = ("local", "slurm", "ray")
# Records of a task: enough to be worth a process, few enough for its memory.
MOST_RECORDS, LEAST_RECORDS = 1 << 16, 1 << 11
# Signatures that are read at a time. datatrove's default of 5 takes most of the time.
_BUFFER = 4096
# Of the files in between.
_FOLDERS = (
    *("passed", "equal signatures", "equal", "different"),
    *("near signatures", "near candidates", "near pairs", "near", "kept"),
)


class Stage(NamedTuple):
    """Blocks that `tasks` processes run, each on a part of the data."""

    name: str
    blocks: list[PipelineStep]
    tasks: int


@dataclass(frozen=True)
class Cluster:
    """Where the stages run; the fields after `workers` are for Slurm."""

    executor: str = "local"
    workers: int = 1
    partition: str | None = None
    time: str = "04:00:00"


@dataclass(frozen=True)
class Plan:
    """What to release.

    threshold: Jaccard similarity of 5-grams of characters from which records are near duplicates.
    options: form, seed and scales, and what else the report should have.
    """

    sources: Sequence[Source]
    out: Path
    filters: dict[str, Filter]
    options: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.8


def task_count(records: int, workers: int) -> int:
    """Tasks that a number of records is worth."""
    tasks = max(-(-records // MOST_RECORDS), min(workers, -(-records // LEAST_RECORDS)), 1)
    return min(tasks, MOST_TASKS)


def stages(plan: Plan, work: Path, tasks: int) -> list[Stage]:
    """The pipeline. Its files in between lie in `work`.

    tasks: in stages that can have any number of them; the result does not depend on it.
    """
    passed, signed, equal, different, hashed, candidates, pairs, similar, kept = (
        str(work / name) for name in _FOLDERS
    )
    names = ["schema", *plan.filters, EXACT_DUPLICATES, NEAR_DUPLICATES]
    removed = {name: str(work / "removed" / name) for name in names}
    equal_removed, similar_removed = (WriteShards(removed[name]) for name in names[-2:])
    filtered = ConversationFilters(plan.filters, str(work / "removed"))
    find = ExactFindDedups(signed, equal, EXACT, lines_to_buffer=_BUFFER)
    unlike = ExactDedupFilter(equal, EXACT, equal_removed)
    bucket = MinhashDedupBuckets(hashed, candidates, config=NEAR, lines_to_buffer=_BUFFER)
    compare = ComparePairs(candidates, different, pairs, plan.threshold)
    cluster = MinhashDedupCluster(pairs, similar, NEAR, lines_to_buffer=_BUFFER)
    keep = WriteKept(kept, plan.options["form"], plan.options["seed"])
    publish = Publish(plan.out, kept, removed, compare.partners, plan.options)

    sign = [WriteShards(passed), ExactDedupSignature(signed, EXACT)]
    sketch = [WriteShards(different), Signatures(hashed)]
    dedup = MinhashDedupFilter(similar, similar_removed)
    return [
        Stage("filters", [ReadRecords(plan.sources), filtered, *sign], tasks),
        Stage("equal", [find], 1),
        Stage("signatures", [ReadShards(passed), unlike, *sketch], tasks),
        Stage("buckets", [bucket], NEAR.num_buckets),
        Stage("compare", [compare, cluster], 1),
        Stage("keep", [ReadShards(different), dedup, keep], tasks),
        Stage("publish", [publish], 1),
    ]


class _QuietExecutor(LocalPipelineExecutor):
    """Without the log on the terminal. Its processes are new ones, so each is told."""

    def _run_for_rank(self, *args: Any, **options: Any) -> Any:
        logger.disable("datatrove")
        return super()._run_for_rank(*args, **options)


def executors(chain: Sequence[Stage], work: Path, cluster: Cluster) -> list[PipelineExecutor]:
    """One executor a stage, each after the one before. Nothing runs yet.

    Local ones do not know of each other: each process would be sent all of them with each task.
    """
    made: list[Any] = []
    for stage in chain:
        options = {
            "pipeline": stage.blocks,
            "tasks": stage.tasks,
            "workers": min(cluster.workers, stage.tasks),
            "logging_dir": str(work / "logs" / stage.name),
        }
        if cluster.executor != "local":
            options["depends"] = made[-1] if made else None
        if cluster.executor == "slurm":
            # An installation of its own is entered again on the nodes.
            inside = sys.prefix != sys.base_prefix
            slurm = SlurmPipelineExecutor(
                **options,
                time=cluster.time,
                partition=cluster.partition,
                mem_per_cpu_gb=4,
                job_name=f"release-{stage.name}",
                qos="",
                env_command=f". {sys.prefix}/bin/activate" if inside else None,
            )
            made.append(slurm)
        elif cluster.executor == "ray":
            made.append(RayPipelineExecutor(**options, mem_per_cpu_gb=4))
        else:
            made.append(_QuietExecutor(**options))
    return made


def run(plan: Plan, cluster: Cluster, work: Path, show: Callable[..., None]) -> None:
    """Run the pipeline, or submit it to Slurm.

    show: a function of (tasks done, tasks in all, the stage), called as they are done.
    Raises UserError for a file that is not JSON.
    """
    logger.disable("datatrove")
    tasks = task_count(sum(source.parts for source in plan.sources), cluster.workers)
    chain = executors(stages(plan, work, tasks), work, cluster)
    if cluster.executor == "slurm":
        # Submits those before it, too.
        chain[-1].run()
        return
    # Or each process of each stage imports everything anew.
    multiprocess.set_forkserver_preload([__name__])
    total = sum(executor.world_size for executor in chain)
    before = 0
    for executor in chain:
        name = Path(executor.logging_dir.path).name
        with _watched(Path(executor.logging_dir.path), name, before, total, show):
            executor.run()
        before += executor.world_size


@contextmanager
def _watched(
    logs: Path, name: str, before: int, total: int, show: Callable[..., None]
) -> Iterator[None]:
    """Call `show` for each task of a stage as its mark appears in the stage's folder."""
    ended = threading.Event()

    def watch() -> None:
        shown = last = 0
        while not last:
            last = ended.wait(0.2)
            done = sum(1 for _ in (logs / "completions").glob("*"))
            for number in range(shown + 1, done + 1):
                show(before + number, total, name)
            shown = done

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def work_folder(out: Path, given: Path | None) -> Iterator[Path]:
    """A folder for the files in between: the given one, which stays, or one beside `out`.

    Raises UserError if the given one has something in it.
    """
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        if any(given.iterdir()):
            raise UserError(f"{given}: is not empty; give a new folder for the files in between")
        yield given
        return
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".work", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
