"""bench stream: what streaming a teacher's targets costs, against loops in one process (see `loops`).

Masked-LM distillation of packed blocks with the triple loss: the same texts, masks, weights, losses and optimizer
everywhere, and all cores, which the stream shares out between teacher and student as a run does. The stream is a run of
the command line, started anew for every round as a user starts it, so that no Ray process is there while the loops have
their turn; its rate is that of a window in which the teacher makes as many rows as the student takes (see `window`).
Every round has every side in turn; ratios are taken within a round and the median over the rounds is reported.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from raydistil import rundir
from raydistil.bench import MINILM
from raydistil.bench.loops import InProcess, Reference
from raydistil.bench.window import Window, window_of
from raydistil.chain import links
from raydistil.config import Config, config_of, flatten
from raydistil.errors import ConfigError
from raydistil.models import load_model, load_tokenizer, outline, resolve
from raydistil.payload import payload_path
from raydistil.pipeline import lesson
from raydistil.plan import cores
from raydistil.prepare import Prepared, Say, prepare
from raydistil.probe import Loop, StudentOnly, taught
from raydistil.roofline import gemm_rate
from raydistil.size import forward_flops
from raydistil.source import MicroBatches
from raydistil.specs import TrainRun
from raydistil.stages import train_run
from raydistil.storage import whole_directory
from raydistil.student import save_model
from raydistil.trace import read_trace
from raydistil.types import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
LENGTH = 128
HONEST = (0.95, 1.05)  # a window's balance: outside, what was made before it (or is left after it) flatters the rate
Shape = Literal["minilm", "base"]
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured, and how much of it."""

    model: Shape
    device: Literal["cpu", "cuda"]
    output: Path
    rounds: int
    texts: int  # of the corpus; about one packed block each
    steps: int  # of each loop in a round
    warm_up: int  # micro-batches of a stream before its window


@dataclass(frozen=True, slots=True)
class Streamed:
    """One run of the stream."""

    window: Window
    first_step_s: float  # from the start of the process
    driver_bytes: int  # data that passed through the driver and the scheduler
    control_bytes: int  # the least that a block sent through one of them on purpose was counted as
    store_bytes: int  # the most that was in the object store
    teacher_builds: int


def bench_stream(setting: Setting, say: Say) -> Tree:
    """The table; see the module. Raises ConfigError where the stream would run on another device than the loops."""
    if (setting.device == "cuda") != torch.cuda.is_available():
        raise ConfigError(f"expected a machine for --device {setting.device}, found another: name the device it has")
    teacher = _teacher(setting)
    sides = {precision: _Side(setting, teacher, precision) for precision in PRECISIONS}
    rounds: list[dict[Precision, Tree]] = []
    for number in range(setting.rounds):
        rounds.append({precision: side.round(number) for precision, side in sides.items()})
        say(_line(number, rounds[-1]))
    return _result(setting, needed_flops(sides["float32"].planned), rounds)


def _teacher(setting: Setting) -> str:
    """The directory of the teacher: a checkpoint with a masked-LM head, random weights where there is none at hand."""
    path = setting.output / f"teacher-{setting.model}"
    if not path.exists():
        torch.manual_seed(0)
        with whole_directory(path) as scratch:
            save_model(_made(setting.model), resolve(MINILM), scratch)
    return str(path.resolve())


def _made(shape: Shape) -> Any:
    if shape == "minilm":
        return load_model(MINILM, "mlm")
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=len(load_tokenizer(MINILM))))


def config_for(setting: Setting, teacher: str, precision: Precision, name: str) -> Config:
    """The run of one precision. Students: every other layer of MiniLM, DistilBERT of BERT-base."""
    return config_of(tree_for(setting, teacher, precision, name))


def tree_for(setting: Setting, teacher: str, precision: Precision, name: str) -> Tree:
    """Its configuration, as a file has it."""
    students: dict[Shape, Tree] = {"minilm": {"layers": [0, 2, 4]}, "base": {"family": "distilbert"}}
    shared = {"teacher_gpus": 0.5, "student_gpus": 0.5} if setting.device == "cuda" else {}
    return {
        "name": name, "output_dir": str(setting.output), "task": "mlm",
        "corpus": {
            "source": "python-docs", "max_rows": setting.texts, "validation_share": 0.0, "test_share": 0.0,
        },
        "tokens": {"length": LENGTH},
        "teacher": {"model": teacher, "precision": precision},
        "student": students[setting.model],
        "distill": {
            "epochs": 1, "dropout": 0.0, "micro_batch_size": 16, "precision": precision,
            "loss": {"kd": 5.0, "task": 2.0, "cosine": 1.0, "temperature": 2.0},
        },
        "cluster": {"trace": True, "max_bytes_in_flight": 32 << 20, **shared},
    }  # fmt: skip


class _Side:
    """One precision: its loops, warm, and its stream."""

    def __init__(self, setting: Setting, teacher: str, precision: Precision) -> None:
        self._setting, self._teacher, self._precision = setting, teacher, precision
        config = config_for(setting, teacher, precision, f"loops-{precision}")
        shutil.rmtree(config.run_dir, ignore_errors=True)  # of another setting, perhaps
        run = prepare(config, lambda line: None)
        self.planned = _planned(run)
        torch.set_num_threads(cores())
        self.loops = _loops(run, self.planned, setting)
        torch.set_num_threads(cores())  # the teacher's class has set its own
        for loop in self.loops.values():
            loop.rate(2)

    def round(self, number: int) -> Tree:
        """{side: tokens a second}, with the stream as a whole and the machine's own rate."""
        torch.set_num_threads(cores())
        rates: Tree = {name: loop.rate(self._setting.steps) for name, loop in self.loops.items()}
        rates["gemm"] = gemm_rate(self._precision, self._setting.device)
        rates["streamed"] = _streamed(self._setting, self._teacher, self._precision, number)
        return rates


def _planned(run: Prepared) -> TrainRun:
    (link,) = links(run.config, run.teacher_dirs, run.run_dir)
    return train_run(run, lesson(run, link))


def needed_flops(planned: TrainRun) -> float:
    """FLOPs a token: the teacher forward, the student forward and backward, both heads at the masked tokens alone."""
    assert planned.source.masking is not None
    worker, share = planned.worker, planned.source.masking.share
    models = (outline(model, worker.task) for model in (worker.teachers[0].model, worker.init))
    teacher, student = (forward_flops(model, LENGTH, share) for model in models)
    return teacher + 3 * student


def _loops(run: Prepared, planned: TrainRun, setting: Setting) -> dict[str, Loop]:
    source = MicroBatches(planned.source)
    batches = [source.make(index) for index in range(min(setting.steps, planned.source.manifest.num_micro_batches))]
    loops: dict[str, Loop] = {
        "inprocess": InProcess(planned, batches),
        "student_only": StudentOnly(planned, taught(planned, batches)),
    }
    if run.config.teacher.precision == "float32":
        last = load_tokenizer(run.config.teacher.model).sep_token_id
        loops["reference"] = Reference(planned, batches, last)
    return loops


def _streamed(setting: Setting, teacher: str, precision: Precision, number: int) -> Streamed:
    """One run, from the command line; nothing of it stays but what was measured."""
    tree = tree_for(setting, teacher, precision, f"stream-{precision}-{number}")
    run_dir, file = setting.output / tree["name"], setting.output / f"{tree['name']}.toml"
    shutil.rmtree(run_dir, ignore_errors=True)
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in flatten(tree).items()))
    started = time.time()
    _command("distill", str(file), "--json")
    records, summary = read_trace(run_dir, rundir.DISTILL), rundir.read_summary(run_dir, rundir.DISTILL)
    assert summary is not None
    paths = [payload_path(run_dir, rundir.DISTILL, process) for process in ("driver", "scheduler")]
    counts = [json.loads(path.read_text()) for path in paths]
    shutil.rmtree(run_dir)
    file.unlink()
    return Streamed(
        window_of(records, setting.warm_up), records[0].ended_s - started,
        sum(count["num_bytes"] for count in counts), min(count["control"] for count in counts),
        summary["peak_store_bytes"], summary["teacher_builds"],
    )  # fmt: skip


def _command(*arguments: str) -> None:
    """Raises RuntimeError, with the end of what it said, where it fails."""
    done = subprocess.run([sys.executable, "-m", "raydistil", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"raydistil {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")


# ---- the table


def _result(setting: Setting, flops: float, rounds: list[dict[Precision, Tree]]) -> Tree:
    rows = [{"precision": precision} | _row([turn[precision] for turn in rounds], flops) for precision in PRECISIONS]
    exact, rough = rows
    references = [turn["float32"]["reference"] for turn in rounds]
    best = max(rows, key=lambda row: row["streamed_tok_s"])
    against = [_tok_s(turn[best["precision"]]) / reference for turn, reference in zip(rounds, references, strict=True)]
    same = [_tok_s(turn["float32"]) / reference for turn, reference in zip(rounds, references, strict=True)]
    return {
        "model": setting.model, "device": setting.device, "rounds": setting.rounds, "threads": cores(),
        "flops_per_token": flops,
        **{key: best[key] for key in ("streamed_tok_s", "inprocess_tok_s", "student_only_tok_s")},
        "reference_tok_s": statistics.median(references),
        "ratio_vs_inprocess": min(row["ratio_vs_inprocess"] for row in rows),
        "ratio_vs_student_only": min(row["ratio_vs_student_only"] for row in rows),
        "ratio_vs_reference": statistics.median(against),
        "ratio_vs_reference_same_dtype": statistics.median(same),
        "roofline_fraction_fp32": exact["roofline_fraction"],
        "roofline_fraction_bf16": rough["roofline_fraction"],
        "inprocess_roofline_fraction_fp32": exact["inprocess_roofline_fraction"],
        **{key: max(row[key] for row in rows) for key in WORST},
        **{key: best[key] for key in ("window_teacher_rows", "window_student_rows")},
        "payload_control_bytes": min(row["payload_control_bytes"] for row in rows),
        "honest_windows": all(row["honest_windows"] for row in rows),
        "rows": rows,
    }  # fmt: skip


WORST = (
    "wait_fraction", "wire_bytes_per_token", "time_to_first_step_s", "driver_payload_bytes", "peak_store_bytes",
    "teacher_builds",
)  # fmt: skip


def _tok_s(turn: Tree) -> float:
    streamed: Streamed = turn["streamed"]
    return streamed.window.tok_s


def _row(turns: list[Tree], flops: float) -> Tree:
    """The medians of one precision."""
    streams: list[Streamed] = [turn["streamed"] for turn in turns]

    def median(of: Callable[[Tree], float]) -> float:
        return statistics.median(map(of, turns))

    return {
        "streamed_tok_s": median(_tok_s),
        "inprocess_tok_s": median(lambda turn: turn["inprocess"]),
        "student_only_tok_s": median(lambda turn: turn["student_only"]),
        "gemm_flops_s": median(lambda turn: turn["gemm"]),
        "ratio_vs_inprocess": median(lambda turn: _tok_s(turn) / turn["inprocess"]),
        "ratio_vs_student_only": median(lambda turn: _tok_s(turn) / turn["student_only"]),
        "roofline_fraction": median(lambda turn: flops * _tok_s(turn) / turn["gemm"]),
        "inprocess_roofline_fraction": median(lambda turn: flops * turn["inprocess"] / turn["gemm"]),
        "wait_fraction": median(lambda turn: turn["streamed"].window.wait_s / turn["streamed"].window.seconds),
        "wire_bytes_per_token": median(lambda turn: turn["streamed"].window.num_bytes / turn["streamed"].window.tokens),
        "honest_windows": all(HONEST[0] <= stream.window.balance <= HONEST[1] for stream in streams),
        "window_balance": median(lambda turn: turn["streamed"].window.balance),
        "window_teacher_rows": sum(stream.window.teacher_rows for stream in streams),
        "window_student_rows": sum(stream.window.student_rows for stream in streams),
        "time_to_first_step_s": median(lambda turn: turn["streamed"].first_step_s),
        "driver_payload_bytes": max(stream.driver_bytes for stream in streams),
        "payload_control_bytes": min(stream.control_bytes for stream in streams),
        "peak_store_bytes": max(stream.store_bytes for stream in streams),
        "teacher_builds": max(stream.teacher_builds for stream in streams),
        "streams": [asdict(stream) for stream in streams],
    }


def _line(number: int, turn: dict[Precision, Tree]) -> str:
    parts = [
        f"{precision} streamed {_tok_s(rates):,.0f} tok/s, {_tok_s(rates) / rates['inprocess']:.2f} of in-process"
        for precision, rates in turn.items()
    ]
    return f"round {number + 1}: " + "; ".join(parts)
