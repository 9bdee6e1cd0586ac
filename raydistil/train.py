"""One training run on Ray Train: the driver's side. Starts it, shows it, stops it when asked, brings its model home."""

import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.train import CheckpointConfig, DataConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistil import rundir, warm
from raydistil.checkpoint import MODEL, latest_state
from raydistil.config.cluster import ClusterConfig
from raydistil.errors import Interrupted, RaydistilError, StorageError, unwrapped
from raydistil.payload import count_payload, counted
from raydistil.report import LiveLine, Progress, Store
from raydistil.specs import TrainRun
from raydistil.steps import Steps
from raydistil.storage import is_disk_full, whole_directory
from raydistil.stream import build_stream, execution_options, shard_rows
from raydistil.types import StepMetrics, TrainSummary

POLL_S = 0.5


def train(run: TrainRun, target: Path) -> TrainSummary:
    """Train to the end, going on from the latest checkpoint if there is one; the model is then at `target`.

    Raises Interrupted after a Ctrl-C, with a checkpoint saved.
    """
    warm.with_training(run.cluster, 0 if run.source.caches else len(run.worker.teachers))
    progress = _progress_of(run)
    trainer = _trainer(run, progress)
    live = LiveLine(run.stage, run.run_dir / "metrics.jsonl")
    store = Store()
    with _stop_on_signal(progress), counted(*run.worker.traced) if run.worker.traced else nullcontext():
        result = _fit(trainer, progress, live, store)
    refused = ray.get(progress.refused.remote())
    ray.kill(progress)
    if refused is not None:
        raise refused
    assert result.metrics is not None and result.checkpoint is not None
    seen = {key: result.metrics[key] for key in TrainSummary.__slots__}
    summary = TrainSummary(**seen | {"peak_store_bytes": store.peak})
    if summary.interrupted:
        raise Interrupted(f"{run.stage} stopped after step {summary.steps}; the same command goes on from there")
    with whole_directory(target) as scratch, result.checkpoint.as_directory() as saved:
        shutil.copytree(Path(saved) / MODEL, scratch, dirs_exist_ok=True)
    shutil.rmtree(_storage(run))
    return summary


def _progress_of(run: TrainRun) -> Any:
    """The actor between the workers and this process, on this process's node: it lives as long."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    log = run.run_dir.resolve() / f"{run.stage}-failures.txt"
    return Progress.options(scheduling_strategy=here).remote(run.cluster.max_failures, log)  # type: ignore[attr-defined]


def _storage(run: TrainRun) -> Path:
    return rundir.checkpoints_of(run.run_dir, run.stage)


def _trainer(run: TrainRun, progress: Any) -> TorchTrainer:
    cluster = run.cluster
    return TorchTrainer(
        _work,
        train_loop_config={"spec": run.worker, "progress": progress},
        datasets={"train": partial(_starting, _storage(run), progress)},  # see _Dealt
        dataset_config=_Dealt(run),
        torch_config=TorchConfig(backend="nccl" if cluster.student_gpus else "gloo", timeout_s=1800),
        scaling_config=ScalingConfig(
            num_workers=cluster.students,
            use_gpu=cluster.student_gpus > 0,
            resources_per_worker=_resources(cluster),
            label_selector=cluster.student_label_selector or None,  # type: ignore[call-arg]  # it is of Train V2
        ),
        run_config=RunConfig(
            name=run.stage,
            storage_path=str(_storage(run).parent),
            failure_config=FailureConfig(max_failures=-1),  # see Progress.start
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What runs on every worker. The stream starts first, then torch and DeepSpeed are imported, here alone."""
    rows = shard_rows()
    from raydistil.worker import StudentWorker

    try:
        StudentWorker(config["spec"], config["progress"], rows).run()
    except Exception as error:
        cause = _explained(error)
        if not isinstance(cause, RaydistilError):
            ray.get(config["progress"].failed.remote(traceback.format_exc()))
            raise
        _refuse(cause, config["progress"])


def _refuse(error: RaydistilError, progress: Any) -> None:
    """Tell the driver of what nothing would mend, and end well: so no one starts again."""
    from torch import distributed

    ray.get(progress.refuse.remote(error))
    distributed.destroy_process_group()  # the others need not wait for this one


def _starting(storage: Path, progress: Any) -> Any:
    """Called in Ray Train's controller when workers are about to start: from which step. Raises if they should not."""
    state = latest_state(storage)
    first = 0 if state is None else state.steps
    refused = ray.get(progress.start.remote(first))
    if refused is not None:
        raise refused
    return first


class _Dealt(DataConfig):
    """The stream, made when it is known how many workers there are: the steps from what `_starting` said."""

    def __init__(self, run: TrainRun) -> None:
        super().__init__()
        self._run = run

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **rest: Any
    ) -> list[dict[str, Any]]:
        run = self._run
        steps = Steps(run.worker.per_step, datasets["train"], run.worker.num_steps, world_size)
        dataset = build_stream(run.source, steps, run.worker.teachers, run.cluster)
        if run.worker.traced:
            count_payload(dataset, *run.worker.traced)
        dataset.context.execution_options = execution_options(run.cluster)
        return [{"train": share} for share in dataset.streaming_split(world_size, equal=True)]


def _resources(cluster: ClusterConfig) -> dict[str, float]:
    gpus = {"GPU": cluster.student_gpus} if cluster.student_gpus else {}
    return {"CPU": cluster.student_cpus, **gpus}


def _fit(trainer: TorchTrainer, progress: Any, live: LiveLine, store: Store) -> Result:
    """`trainer.fit()` in the background, its progress in the foreground."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            _drain(progress, live, store.look())
    finally:
        live.close()
    if "error" in outcome:
        raise _explained(outcome["error"]) from outcome["error"]
    result: Result = outcome["result"]
    return result


def _explained(error: BaseException) -> BaseException:
    """`error` as the user should meet it."""
    if is_disk_full(error):
        return StorageError("no space left while saving a checkpoint; the previous one is intact: free some, run again")
    return unwrapped(error)


def _drain(progress: Any, live: LiveLine, store_bytes: int) -> None:
    for metrics in ray.get(progress.drain.remote()):
        live.show(StepMetrics(**metrics | {"store_bytes": store_bytes}))


@contextmanager
def _stop_on_signal(progress: Any) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks for a checkpoint and an end, the second one ends at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        sys.stderr.write("\nstopping after a checkpoint; Ctrl-C again to stop at once\n")
        progress.stop.remote()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
