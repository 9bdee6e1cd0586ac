"""bench chaos: whatever is killed, no text is lost and none is trained on twice.

A distillation on several Ray nodes of this machine, during which a schedule drawn from the seed kills teachers, student
workers, whole nodes and the driver, each time after some more progress. What came of every micro-batch is read out of
the trace, which the student workers write beside the ledger and not from it. The same run without kills stands beside
it: the same micro-batches make each of its optimizer steps, and with one student worker its weights are the same to the
last bit.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from raydistil import rundir
from raydistil.bench import MINILM
from raydistil.bench.nodes import PART, STORE_BYTES, Nodes, head_node
from raydistil.config import Config, load_config
from raydistil.errors import FailedError
from raydistil.manifest import Manifest
from raydistil.models import load_tokenizer, quiet_transformers, resolve
from raydistil.prepare import Say, make_store
from raydistil.storage import whole_directory
from raydistil.student import save_model
from raydistil.tokens import TokenStore
from raydistil.trace import Audit, Record, audit, history, read_trace

Kind = Literal["teacher", "student", "node", "driver"]
Tree = dict[str, Any]
FULL: dict[Kind, int] = {"teacher": 8, "student": 6, "node": 3, "driver": 4}
QUICK: dict[Kind, int] = {"teacher": 1, "student": 1, "node": 1, "driver": 1}
STEPS_PER_KILL = 30  # enough for every kill to be followed by progress, and for what is repeated
APART = (3, 15)  # steps from one kill to the next, fewest and most
EVERY_STEPS = 8  # from one checkpoint to the next
LOOK_S = 0.05
PATIENCE_S = 300.0  # without a step
TITLES: dict[Kind, str] = {"teacher": "ray::MapWorker", "student": "ray::RayTrainWorker"}
ROWS, BATCH = 240, 4
NOISE = 0.01  # of the final loss, with several student workers, whose gradients are added up in another order

TOML = """name = "{name}"
output_dir = "{folder}"
seed = {seed}
task = "mlm"

[corpus]
source = "python-docs"
max_rows = {rows}
validation_share = 0.0
test_share = 0.0

[tokens]
length = 32

[teacher]
model = "{teacher}"

[student]
layers = [0, 2]

[distill]
epochs = {epochs}
micro_batch_size = {batch}
lr = 1e-3

[checkpoints]
every_steps = {every}

[cluster]
trace = true
students = {students}
teachers = [2, 2]
student_threads = 1
teacher_threads = 1
student_label_selector = {{ {part} = "student" }}
teacher_label_selector = {{ {part} = "teacher" }}
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """Of the benchmark."""

    output: Path
    seed: int
    students: int
    kills: dict[Kind, int]


def bench_chaos(setting: Setting, say: Say) -> Tree:
    """Kill, audit and compare, see the module. `passed`: whether everything was as it should be."""
    quiet_transformers()
    setting.output.mkdir(parents=True, exist_ok=True)
    calm, wild = (_config(setting, name) for name in ("undisturbed", "chaos"))
    with head_node(STORE_BYTES, {}) as cluster:
        nodes = Nodes(cluster, ("student", "teacher", "teacher"), 2 * setting.students + 2)
        say(f"undisturbed: {_manifest(calm).num_micro_batches} micro-batches")
        calm_s = _undisturbed(nodes, calm)
        began = time.monotonic()
        kills = Kills(setting, nodes, wild, say)
        kills.run()
        wild_s = time.monotonic() - began
    return _result(setting, calm, wild, kills, (calm_s, wild_s))


# ---- the runs


def _config(setting: Setting, name: str) -> Config:
    """A run of its own for each seed; the file is there for whoever wants to look."""
    folder, full = setting.output.resolve(), f"{name}-{setting.seed}-{setting.students}"
    path, steps = folder / f"{full}.toml", STEPS_PER_KILL * sum(setting.kills.values())
    for epochs in (1, None):
        per_epoch = 1 if epochs else _manifest(load_config(path, [])).per_epoch
        path.write_text(TOML.format(
            name=full, folder=folder, seed=setting.seed, rows=ROWS, teacher=_teacher(folder), batch=BATCH, part=PART,
            epochs=epochs or -(-steps * setting.students // per_epoch), every=EVERY_STEPS, students=setting.students,
        ))  # fmt: skip
    shutil.rmtree(folder / full, ignore_errors=True)  # of a benchmark before
    return load_config(path, [])


def _teacher(folder: Path) -> Path:
    """Four narrow layers of random weights, with a real vocabulary."""
    path = folder / "teacher"
    if not path.exists():
        torch.manual_seed(0)
        shape = BertConfig(
            vocab_size=len(load_tokenizer(MINILM)), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=64,
        )  # fmt: skip
        with whole_directory(path) as scratch:
            save_model(BertForMaskedLM(shape), resolve(MINILM), scratch)
    return path


def _manifest(config: Config) -> Manifest:
    assert config.distill is not None
    rows = TokenStore(make_store(config)).bucket_rows("train")
    return Manifest(rows, config.distill.epochs, config.distill.micro_batch_size, config.seed)


@contextmanager
def _driver(nodes: Nodes, config: Config) -> Iterator["subprocess.Popen[bytes]"]:
    """`raydistil distill`, on the cluster; what it says is kept beside the run."""
    toml = config.output_dir / f"{config.name}.toml"
    with _log(config).open("ab") as file:
        yield _started(nodes, toml, file)


def _log(config: Config) -> Path:
    return config.output_dir / f"{config.name}.log"


def _started(nodes: Nodes, toml: Path, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "raydistil", "distill", str(toml), "--json"]
    environment = dict(os.environ) | {"RAY_ADDRESS": nodes.address}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _undisturbed(nodes: Nodes, config: Config) -> float:
    """Seconds it takes."""
    began = time.monotonic()
    with _driver(nodes, config) as driver:
        _ended_well(driver, config)
    return time.monotonic() - began


def _ended_well(driver: "subprocess.Popen[bytes]", config: Config) -> None:
    if driver.wait() != 0:
        log = _log(config)
        *_, last = log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
        raise FailedError(f"expected the run to end well, got exit code {driver.returncode} ({last}): see {log}")


class Kills:
    """A schedule of them, and what came of it."""

    def __init__(self, setting: Setting, nodes: Nodes, config: Config, say: Say) -> None:
        self._nodes, self._config, self._say = nodes, config, say
        self._random = random.Random(setting.seed)
        kinds = [kind for kind, count in setting.kills.items() for _ in range(count)]
        self._planned = self._random.sample(kinds, len(kinds))
        self.done: list[Kind] = []
        self.drivers = 0

    def run(self) -> None:
        """To the end of the training, with a new driver whenever one was killed."""
        over = False
        while not over:
            self.drivers += 1
            with _driver(self._nodes, self._config) as driver:
                over = not self._haunt(driver)
                if over:
                    _ended_well(driver, self._config)
                driver.wait()

    def _haunt(self, driver: "subprocess.Popen[bytes]") -> bool:
        """Kill what is planned, until that is `driver`: then True. False: there is nothing more to kill."""
        while len(self.done) < len(self._planned):
            steps = self._random.randint(*APART)
            if not self._progress(driver, steps):
                return False
            kind = self._planned[len(self.done)]
            what = self._kill(kind, driver)
            self.done.append(kind)
            self._say(f"kill {len(self.done)}/{len(self._planned)}: {what}, after step {self._last_step()}")
            if kind == "driver":
                return True
        return False

    def _progress(self, driver: "subprocess.Popen[bytes]", steps: int) -> bool:
        """Wait for so many more steps; False: the training was over before."""
        since, deadline = time.time(), time.monotonic() + PATIENCE_S
        while sum(record.asked_s > since for record in self._records()) < steps:
            if driver.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise FailedError(
                    f"expected progress within {PATIENCE_S:.0f} s of a kill, got none: see {_log(self._config)}"
                )
            time.sleep(LOOK_S)
        return True

    def _kill(self, kind: Kind, driver: "subprocess.Popen[bytes]") -> str:
        if kind == "node":
            return f"the node of a {self._nodes.replace(self._random.randrange(3))}"
        if kind == "driver":
            driver.kill()
            return "driver"
        process = self._random.choice(self._found(kind))
        os.kill(process.pid, signal.SIGKILL)
        return f"{kind} {process.pid}"

    def _found(self, kind: Kind) -> list[Any]:
        """Those there are: one of several teachers may be on its way back."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := self._nodes.workers(TITLES[kind])):
            if time.monotonic() > deadline:
                raise FailedError(f"expected a {kind} within {PATIENCE_S:.0f} s, found none: see {_log(self._config)}")
            time.sleep(LOOK_S)
        return found

    def _records(self) -> list[Record]:
        return read_trace(self._config.run_dir, rundir.DISTILL)

    def _last_step(self) -> int:
        *_, last = self._records()
        return last.step


# ---- what came of it


def _result(setting: Setting, calm: Config, wild: Config, kills: Kills, seconds: tuple[float, float]) -> Tree:
    manifest, records = _manifest(wild), read_trace(wild.run_dir, rundir.DISTILL)
    found = audit(records, manifest.num_micro_batches)
    summaries = [rundir.read_summary(config.run_dir, rundir.DISTILL) or {} for config in (wild, calm)]
    losses = [summary["final_losses"]["loss"] for summary in summaries]
    same, control = _same_weights(wild, calm), audit_control(records, found, setting.seed)
    alike = _steps(records) == _steps(read_trace(calm.run_dir, rundir.DISTILL))
    near = abs(losses[0] - losses[1]) <= NOISE * abs(losses[1])
    stand = [record for record in history(records) if record.num_rows]
    by_kind = Counter(kills.done)
    return {
        "passed": control and not found.lost and not found.duplicated and by_kind == setting.kills
        and alike and near and (same or setting.students > 1),
        "seed": setting.seed, "students": setting.students,
        "positions_expected": manifest.num_positions,
        "positions_trained": sum(record.num_rows for record in stand),
        "lost": _positions(manifest, found.lost), "duplicated": _positions(manifest, found.duplicated),
        "audit_control": control,
        "kills": len(kills.done), "kills_by_kind": {kind: by_kind[kind] for kind in setting.kills},
        "resumes": kills.drivers - 1, "worker_starts": len({record.began_s for record in records}),
        "teachers_built": len({timing.teacher for record in records for timing in record.taught}),
        "final_loss": losses[0], "uninterrupted_final_loss": losses[1], "same_weights": same, "same_steps": alike,
        "steps": max(record.step for record in records), "micro_batches_repeated": found.repeated,
        "steps_repeated": found.repeated // setting.students,
        "wall_s": seconds[1], "uninterrupted_wall_s": seconds[0], "wall_overhead": seconds[1] / seconds[0],
    }  # fmt: skip


def _steps(records: list[Record]) -> dict[int, set[int]]:
    """The micro-batches of each optimizer step that the last checkpoint stands on."""
    made: dict[int, set[int]] = {}
    for record in history(records):
        made.setdefault(record.step, set()).add(record.index)
    return made


def _positions(manifest: Manifest, indices: list[int]) -> int:
    return sum(len(manifest.slot(index).rows) for index in indices)


def _same_weights(first: Config, second: Config) -> bool:
    one, other = (load_file(config.run_dir / rundir.DISTILLED / "model.safetensors") for config in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def audit_control(records: list[Record], found: Audit, seed: int) -> bool:
    """Whether the audit tells of one micro-batch that is taken out of the trace and of one that is put in twice."""
    stand = [record for record in history(records) if record.num_rows]
    dropped, doubled = random.Random(seed).sample(stand, 2)
    spoilt = [record for record in records if record != dropped] + [doubled]
    told = audit(spoilt, found.expected)
    return told.lost == sorted([*found.lost, dropped.index]) and told.duplicated == sorted(
        {*found.duplicated, doubled.index}
    )
