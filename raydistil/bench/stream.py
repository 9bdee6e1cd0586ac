"""bench stream: what streaming a teacher's targets costs, against loops in one process (see `loops`).

Masked-LM distillation of packed blocks with the triple loss: the same texts, masks, weights, losses and optimizer
everywhere, and all cores, which the stream shares out between teacher and student as a run does. The stream is a run of
the command line, started anew for every round as a user starts it, so that no Ray process is there while the loops have
their turn, in a process of their own; its rate is that of a window in which the teacher makes as many rows as the
student takes (see `window`). On CPUs it has a turn more, `apart`, with half the cores for each: there a student's wait
is for a teacher that is too slow, where cores are shared it is the teacher's turn. Every round has every side in turn;
ratios are taken within a round and the median over the rounds is reported.
"""

import json
import os
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
from raydistil.bench.loops import measured
from raydistil.bench.processes import in_a_process
from raydistil.bench.window import Window, window_of
from raydistil.cluster import environment
from raydistil.config import Config, config_of, flatten
from raydistil.errors import ConfigError
from raydistil.models import load_model, load_tokenizer, resolve
from raydistil.optim import merged
from raydistil.payload import payload_path
from raydistil.plan import cores
from raydistil.prepare import Say
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
    os.environ.update(environment())  # the loops' processes allocate as those of a run do
    teacher = _teacher(setting)
    for precision in PRECISIONS:
        shutil.rmtree(_of_loops(setting, teacher, precision).run_dir, ignore_errors=True)  # of another setting, perhaps
    rounds: list[dict[Precision, Tree]] = []
    for number in range(setting.rounds):
        rounds.append({precision: _round(setting, teacher, precision, number) for precision in PRECISIONS})
        say(_line(number, rounds[-1]))
    return _result(setting, rounds)


def _of_loops(setting: Setting, teacher: str, precision: Precision) -> Config:
    return config_of(tree_for(setting, teacher, precision, f"loops-{precision}"))


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


def tree_for(setting: Setting, teacher: str, precision: Precision, name: str) -> Tree:
    """The configuration of one precision. Students: every other layer of MiniLM, DistilBERT of BERT-base."""
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


def _round(setting: Setting, teacher: str, precision: Precision, number: int) -> Tree:
    """Every side in turn: {loop: tokens a second}, the machine's own rate, and the streams as a whole."""
    loops = _of_loops(setting, teacher, precision)
    found: Tree = in_a_process(measured, loops, setting.steps, setting.device, number)
    tree = tree_for(setting, teacher, precision, f"stream-{precision}-{number}")
    found["streamed"] = _streamed(setting, tree)
    if setting.device == "cpu":
        found["apart"] = _streamed(setting, merged(tree, _apart()))
    return found


def _apart() -> Tree:
    """Half the cores for the teacher, the others for the student: neither has the other's when that one waits."""
    half = max(1, cores() // 2)
    return {"cluster": {"teacher_threads": half, "student_threads": max(1, cores() - half)}}


def _streamed(setting: Setting, tree: Tree) -> Streamed:
    """One run, from the command line; nothing of it stays but what was measured."""
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
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # here, as the loops are
    done = subprocess.run([sys.executable, "-m", "raydistil", *arguments], capture_output=True, text=True, env=own)
    if done.returncode:
        raise RuntimeError(f"raydistil {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")


# ---- the table


def _result(setting: Setting, rounds: list[dict[Precision, Tree]]) -> Tree:
    rows = [{"precision": precision} | _row([turn[precision] for turn in rounds]) for precision in PRECISIONS]
    exact, rough = rows
    references = [turn["float32"]["reference"] for turn in rounds]
    best = max(rows, key=lambda row: row["streamed_tok_s"])
    against = [_tok_s(turn[best["precision"]]) / reference for turn, reference in zip(rounds, references, strict=True)]
    same = [_tok_s(turn["float32"]) / reference for turn, reference in zip(rounds, references, strict=True)]
    return {
        "model": setting.model, "device": setting.device, "rounds": setting.rounds, "threads": cores(),
        "flops_per_token": rounds[0]["float32"]["flops"],
        **{key: best[key] for key in ("streamed_tok_s", "inprocess_tok_s", "student_only_tok_s")},
        "reference_tok_s": statistics.median(references),
        "ratio_vs_inprocess": min(row["ratio_vs_inprocess"] for row in rows),
        "ratio_vs_student_only": min(row["ratio_vs_student_only"] for row in rows),
        "ratio_vs_reference": statistics.median(against),
        "ratio_vs_reference_same_dtype": statistics.median(same),
        "roofline_fraction_fp32": exact["roofline_fraction"],
        "roofline_fraction_bf16": rough["roofline_fraction"],
        "inprocess_roofline_fraction_fp32": exact["inprocess_roofline_fraction"],
        **{key: max(row[key] for row in rows) for key in WORST if all(key in row for row in rows)},
        **{key: best[key] for key in ("window_teacher_rows", "window_student_rows")},
        "payload_control_bytes": min(row["payload_control_bytes"] for row in rows),
        "honest_windows": all(row["honest_windows"] for row in rows),
        "rows": rows,
    }  # fmt: skip


WORST = (
    "wait_fraction", "apart_wait_fraction", "wire_bytes_per_token", "time_to_first_step_s", "driver_payload_bytes",
    "peak_store_bytes", "teacher_builds",
)  # fmt: skip


def _tok_s(turn: Tree) -> float:
    streamed: Streamed = turn["streamed"]
    return streamed.window.tok_s


def _row(turns: list[Tree]) -> Tree:
    """The medians of one precision."""
    streams: list[Streamed] = [turn["streamed"] for turn in turns]
    either = streams + [turn["apart"] for turn in turns if "apart" in turn]

    def median(of: Callable[[Tree], float]) -> float:
        return statistics.median(map(of, turns))

    return _apart_row([turn for turn in turns if "apart" in turn]) | {
        "streamed_tok_s": median(_tok_s),
        "inprocess_tok_s": median(lambda turn: turn["inprocess"]),
        "student_only_tok_s": median(lambda turn: turn["student_only"]),
        "gemm_flops_s": median(lambda turn: turn["gemm"]),
        "ratio_vs_inprocess": median(lambda turn: _tok_s(turn) / turn["inprocess"]),
        "ratio_vs_student_only": median(lambda turn: _tok_s(turn) / turn["student_only"]),
        "roofline_fraction": median(lambda turn: turn["flops"] * _tok_s(turn) / turn["gemm"]),
        "inprocess_roofline_fraction": median(lambda turn: turn["flops"] * turn["inprocess"] / turn["gemm"]),
        "wait_fraction": median(lambda turn: turn["streamed"].window.wait_fraction),
        "wire_bytes_per_token": median(lambda turn: turn["streamed"].window.num_bytes / turn["streamed"].window.tokens),
        "honest_windows": all(HONEST[0] <= stream.window.balance <= HONEST[1] for stream in either),
        "window_balance": median(lambda turn: turn["streamed"].window.balance),
        "window_teacher_rows": sum(stream.window.teacher_rows for stream in streams),
        "window_student_rows": sum(stream.window.student_rows for stream in streams),
        "time_to_first_step_s": median(lambda turn: turn["streamed"].first_step_s),
        "driver_payload_bytes": max(stream.driver_bytes for stream in either),
        "payload_control_bytes": min(stream.control_bytes for stream in either),
        "peak_store_bytes": max(stream.store_bytes for stream in either),
        "teacher_builds": max(stream.teacher_builds for stream in either),
        "streams": [asdict(stream) for stream in streams],
    }


def _apart_row(turns: list[Tree]) -> Tree:
    """The medians of one precision, of streams whose sides had cores of their own; nothing where there were none."""
    if not turns:
        return {}
    windows: list[Window] = [turn["apart"].window for turn in turns]
    ratios = [window.tok_s / turn["inprocess"] for window, turn in zip(windows, turns, strict=True)]
    return {
        "apart_tok_s": statistics.median(window.tok_s for window in windows),
        "apart_ratio_vs_inprocess": statistics.median(ratios),
        "apart_wait_fraction": statistics.median(window.wait_fraction for window in windows),
        "apart_streams": [asdict(turn["apart"]) for turn in turns],
    }


def _line(number: int, turn: dict[Precision, Tree]) -> str:
    parts = [
        f"{precision} streamed {_tok_s(rates):,.0f} tok/s, {_tok_s(rates) / rates['inprocess']:.2f} of in-process"
        for precision, rates in turn.items()
    ]
    return f"round {number + 1}: " + "; ".join(parts)
