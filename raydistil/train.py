"""One training run on Ray Train: the driver's side. Starts it, shows it, stops it when asked, brings its model home."""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from pyarrow.fs import FileSystem, FileType
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistil import warm
from raydistil.checkpoint import MODEL, CheckpointStore, Kept
from raydistil.cluster import check_room
from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.config.cluster import ClusterConfig
from raydistil.elastic import Elastic, ElasticTrainer
from raydistil.errors import Interrupted, PlanError, RaydistilError, StorageError, unwrapped
from raydistil.payload import count_payload, counted
from raydistil.plan import Need, need_of
from raydistil.progress import Progress, Wish
from raydistil.report import LiveLine, Store
from raydistil.specs import SaveSpec, TrainRun, WorkerSpec
from raydistil.steps import Steps
from raydistil.storage import whole_directory
from raydistil.stream import build_stream, execution_options, shard_rows
from raydistil.types import StepMetrics, TrainSummary

POLL_S = 0.5
QUIET_S = 120.0  # without a step: then one should know why
PAUSES_S = (1.0, 5.0, 25.0)  # between the tries to read a store
SPINS = "GOMP_SPINCOUNT"
Say = Callable[[str], None]


def train(run: TrainRun, target: Path, say: Say, record: Callable[[TrainSummary], None]) -> None:
    """Train to the end, going on from the latest checkpoint if there is one; the model is then at `target`, and was
    not before `record` had its summary.

    Raises Interrupted after a Ctrl-C, with a checkpoint saved.
    """
    store = run.save.store
    asked, kept = False, store.newest_whole(run.save.run_hash, say)
    if kept is None or kept.state.steps < run.worker.num_steps:
        summary, asked = _trained(run)
        kept = store.newest_whole(run.save.run_hash, say, below=MODEL)
    else:
        summary = kept.state.summary  # the driver was killed on its way home
    if kept is None or kept.state.steps < run.worker.num_steps:
        raise StorageError(
            f"expected the checkpoint of the last step in {store.place}/{store.below}, got one that is damaged: run "
            f"again, and it is made once more from the one before"
        )
    with whole_directory(target) as scratch, store.at_hand(f"{kept.name}/{MODEL}") as saved:
        shutil.copytree(saved, scratch, dirs_exist_ok=True)
        record(summary)
    clear_up(run.save.config, store)
    if asked:
        raise Interrupted(f"{run.stage} is done; the same command goes on with what comes after it")


def clear_up(config: CheckpointsConfig, store: CheckpointStore) -> None:
    """The checkpoints of what was trained to its end, unless they are to be kept."""
    if not config.keep_at_end:
        store.remove_all()
        _forget_ray_train(store)


def _trained(run: TrainRun) -> tuple[TrainSummary, bool]:
    """The training itself, from wherever it stands to its end: (what it was, whether it was to stop when there was
    nothing left to stop).
    """
    warm.with_training(run.cluster, 0 if run.source.caches else len(run.worker.teachers))
    progress = _progress_of(run)
    live = LiveLine(run.stage, run.run_dir / "metrics.jsonl")
    store = Store()
    with _stop_on_signal(progress) as asked, counted(*run.worker.traced) if run.worker.traced else nullcontext():
        _fit(_trainer(run, progress), progress, live, store, Silence(_need(run)))
    summary: TrainSummary | None
    summary, refused, starts = ray.get(progress.outcome.remote())
    ray.kill(progress)
    _forget_ray_train(run.save.store)
    if refused is not None:
        raise refused
    if summary is None:  # workers died between the last checkpoint and saying so
        last = run.save.store.newest()
        assert last is not None
        summary = last.state.summary
    if summary.interrupted:
        raise Interrupted(f"{run.stage} stopped after step {summary.steps}; the same command goes on from there")
    seen = replace(summary, peak_store_bytes=store.peak, spilled_bytes=store.spilled(), restarts=starts - 1)
    return seen, asked.is_set()


def _progress_of(run: TrainRun) -> Any:
    """The actor between the workers and this process, on this process's node: it lives as long."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = run.run_dir.resolve() / f"{run.stage}-failures.txt"
    return Progress.options(scheduling_strategy=here).remote(run.cluster.max_failures, log)  # type: ignore[attr-defined]


def _place_for_ray_train(store: CheckpointStore) -> tuple[FileSystem, str]:
    """Ray Train wants one that all workers write to. The checkpoints are none of its own: it would start from one that
    it was killed in the middle of writing down, and looks at no digest."""
    filesystem, path = store.open()
    return filesystem, f"{path}.ray"


def _forget_ray_train(store: CheckpointStore) -> None:
    filesystem, path = _place_for_ray_train(store)
    if filesystem.get_file_info(path).type == FileType.Directory:
        filesystem.delete_dir(path)


def _trainer(run: TrainRun, progress: Any) -> TorchTrainer:
    cluster, scaling = run.cluster, _scaling(run.cluster)
    configured: Any = RunConfig  # `worker_runtime_env` is of Train V2, whose types are hidden
    filesystem, path = _place_for_ray_train(run.save.store)
    trainer = ElasticTrainer(
        _work,
        train_loop_config={"spec": run.worker, "save": run.save, "progress": progress},
        datasets={"train": partial(_starting, run.save, progress)},  # see _Dealt
        dataset_config=_Dealt(run, progress),
        torch_config=TorchConfig(
            backend="nccl" if cluster.student_gpus else "gloo", timeout_s=int(cluster.hang_timeout_s)
        ),
        scaling_config=scaling,
        run_config=configured(
            name=Path(path).name,
            storage_path=str(Path(path).parent),
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=-1),  # see Progress.start
            worker_runtime_env={"env_vars": spinning(run.worker)},
        ),
    )
    if cluster.fewest_students < cluster.most_students:
        trainer.policy = Elastic(scaling, _need(run), run.save.store, progress)
    return trainer


def _need(run: TrainRun) -> Need:
    return need_of(run.cluster, 0 if run.source.caches else len(run.worker.teachers))


def spinning(worker: WorkerSpec) -> dict[str, str]:
    """How long a thread of a student's looks out for the others before it lets go of its core, in GNU OpenMP's turns.

    Where teachers work behind it on the same cores: some hundred microseconds. As long as it looks they cannot work,
    and the student waits for them in turn; a thread that looks for a shorter time sleeps when the next of a step's
    hundreds of products comes, and wakes up late. Elsewhere, and where the environment says something of it, as it is.
    """
    said = any(key in os.environ for key in (SPINS, "OMP_WAIT_POLICY"))
    return {SPINS: "5000"} if worker.shares_cores and not said else {}


def _work(config: dict[str, Any]) -> None:
    """What runs on every worker. The stream starts first, then torch and DeepSpeed are imported, here alone."""
    rows = shard_rows()
    from raydistil.worker import StudentWorker

    try:
        StudentWorker(config["spec"], config["save"], config["progress"], rows).run()
    except Exception as error:
        cause = unwrapped(error)
        if not isinstance(cause, RaydistilError):
            ray.get(config["progress"].failed.remote(traceback.format_exc()))
            raise
        _refuse(cause, config["progress"])


def _refuse(error: RaydistilError, progress: Any) -> None:
    """Tell the driver of what nothing would mend, and end well: so no one starts again."""
    from torch import distributed

    ray.get(progress.refuse.remote(error))
    distributed.destroy_process_group()  # the others need not wait for this one


def _starting(save: SaveSpec, progress: Any) -> Any:
    """Called in Ray Train's controller when workers are about to start: from which step. Raises if they should not."""
    kept = _swept(save, progress)
    first, name = (kept.state.steps, kept.name) if kept else (0, None)
    refused = ray.get(progress.start.remote(first, name))
    if refused is not None:
        raise refused
    return first


def _swept(save: SaveSpec, progress: Any) -> Kept | None:
    """The newest whole checkpoint, what never was one removed; of a store that may not answer for a moment."""
    for pause_s in PAUSES_S:
        with suppress(OSError):
            save.store.sweep()
            return save.store.newest_whole(save.run_hash, progress.tell.remote)
        time.sleep(pause_s)
    save.store.sweep()
    return save.store.newest_whole(save.run_hash, progress.tell.remote)


class _Dealt(DataConfig):
    """The stream, made when it is known how many workers there are: the steps from what `_starting` said."""

    def __init__(self, run: TrainRun, progress: Any) -> None:
        super().__init__()
        self._run, self._progress = run, progress

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **rest: Any
    ) -> list[dict[str, Any]]:
        run = self._run
        steps = Steps(run.worker.per_step, datasets["train"], run.worker.num_steps, world_size)
        dataset = build_stream(run.source, steps, run.worker.teachers, run.cluster, self._progress)
        if run.worker.traced:
            count_payload(dataset, *run.worker.traced)
        dataset.context.execution_options = execution_options(run.cluster)
        return [{"train": share} for share in dataset.streaming_split(world_size, equal=True)]


def _scaling(cluster: ClusterConfig) -> ScalingConfig:
    """Pairs of numbers and labels are of Train V2, whose types are hidden."""
    make: Any = ScalingConfig
    few, most = cluster.fewest_students, cluster.most_students
    gpus = {"GPU": cluster.student_gpus} if cluster.student_gpus else {}
    made: ScalingConfig = make(
        num_workers=few if few == most else (few, most),
        use_gpu=cluster.student_gpus > 0,
        resources_per_worker={"CPU": cluster.student_cpus, **gpus},
        label_selector=cluster.student_label_selector or None,
    )
    return made


def _fit(trainer: TorchTrainer, progress: Any, live: LiveLine, store: Store, silence: "Silence") -> None:
    """`trainer.fit()` in the background, its progress in the foreground."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    preempted = Preempted(progress)
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            preempted.look()
            heard = _drain(progress, live, store.look())
            for line in silence.look(heard, time.monotonic()):
                live.tell(line)
    finally:
        live.close()
    if "error" in outcome:
        raise unwrapped(outcome["error"]) from outcome["error"]


def _drain(progress: Any, live: LiveLine, store_bytes: int) -> bool:
    """Whether there was anything."""
    all_metrics, news = ray.get(progress.drain.remote())
    for metrics in all_metrics:
        live.show(StepMetrics(**metrics | {"store_bytes": store_bytes}))
    for line in news:
        live.tell(line)
    return bool(all_metrics or news)


class Silence:
    """What there is to say when the workers have made no step for a while."""

    def __init__(self, need: Need) -> None:
        self._need = need
        self._since_s: float | None = None
        self._patience_s = QUIET_S

    def look(self, heard: bool, now_s: float) -> Iterator[str]:
        """A line each time that the silence has lasted twice as long."""
        if heard or self._since_s is None:
            self._since_s, self._patience_s = now_s, QUIET_S
        if now_s - self._since_s < self._patience_s:
            return
        self._patience_s *= 2
        yield f"no step for {now_s - self._since_s:.0f} s: {self._why()}"

    def _why(self) -> str:
        try:
            check_room([self._need])
        except PlanError as error:
            return f"{error}; it goes on when they are there"
        return (
            "the cluster is large enough for the run; others may hold what it needs, a teacher or a checkpoint may "
            "take long, or something hangs"
        )


class Preempted:
    """Whether the cluster has been told that a node of it will go: there is time for a checkpoint."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._known: set[str] = set()

    def look(self) -> None:
        found = set(ray._private.state.state.get_draining_nodes())
        for node in found - self._known:
            self._progress.tell.remote(f"node {node[:8]} will go: saving a checkpoint")
            self._progress.wish.remote(Wish.SAVE)
        self._known = found


@contextmanager
def _stop_on_signal(progress: Any) -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint and an end, the second one ends at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        sys.stderr.write("\nstopping after a checkpoint; Ctrl-C again to stop at once\n")
        progress.wish.remote(Wish.STOP)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
