"""The command line: thin. Tables for people on stdout, or one JSON object with --json; everything else on stderr.

Exit codes: 0 done, 2 bad usage, configuration or data (one line), 1 a failure, 130 interrupted.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from raydistil.config import Config, load_config
from raydistil.errors import FailedError, Interrupted, RaydistilError

Result = dict[str, Any]
Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raydistil", message="%(prog)s %(version)s")
def app() -> None:
    """Distil a transformer: teacher on Ray Data, student on Ray Train with DeepSpeed, endpoint on Ray Serve."""


def _on_config(command: Command) -> Command:
    """The argument and the option of every command that works on a configuration."""
    command = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value.")(command)
    return click.argument("config", type=click.Path(path_type=Path))(command)


_share = click.FloatRange(0, 1)
_backend = click.Choice(["auto", "torch", "packed", "onnx", "mixed", "bf16", "int8"])
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")


@contextmanager
def _stdout_for_us() -> Iterator[int]:
    """A copy of stdout for the result; file descriptor 1 itself goes to stderr, since libraries print there."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield ours
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _emit(work: Callable[[], Result], as_json: bool, table: Callable[[Result], None]) -> None:
    """Run `work`, then show its result on the real stdout."""
    with _stdout_for_us() as ours:
        result = work()
        text = json.dumps(result, default=str) + "\n" if as_json else ""
        os.write(ours, text.encode())
    if not as_json:
        table(result)


@app.command()
@_on_config
@_json
def run(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """The whole chain, as the configuration has it."""
    from raydistil import pipeline, tables

    loaded = load_config(config, list(overrides))
    _emit(lambda: pipeline.run_all(loaded, _say), as_json, tables.show_report)


@app.command()
@_on_config
@click.option("--show", default=3, show_default=True, type=click.IntRange(min=0), help="Examples to show.")
@click.option("--probe", is_flag=True, help="Take a few steps here, to say whether teacher or student will be slower.")
@_json
def check(config: Path, overrides: tuple[str, ...], show: int, probe: bool, as_json: bool) -> None:
    """The resolved configuration, a sample of the data and the plan; trains nothing."""
    from raydistil import tables
    from raydistil.check import check as examine

    _emit(lambda: examine(config, list(overrides), show, probe), as_json, tables.show_check)


@app.command()
@_json
def doctor(as_json: bool) -> None:
    """What this machine offers: devices, memory, disk, versions, Ray."""
    from raydistil import tables
    from raydistil.doctor import examine

    _emit(examine, as_json, tables.show_doctor)


def _stage(config: Config, name: str, as_json: bool) -> None:
    from raydistil import pipeline, tables

    _emit(lambda: pipeline.run_stage(config, name, _say), as_json, tables.show_report)


@app.command()
@_on_config
@_json
def finetune(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Teach the teacher the task."""
    _stage(load_config(config, list(overrides)), "finetune", as_json)


@app.command()
@_on_config
@_json
def distill(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Teach the student what the teacher says."""
    _stage(load_config(config, list(overrides)), "distill", as_json)


@app.command()
@_on_config
@_json
def evaluate(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Score teacher and student."""
    _stage(load_config(config, list(overrides)), "evaluate", as_json)


@app.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "formats",
    metavar="FORMATS",
    help="Of hf, bf16, onnx, fp16, int8, int8-static, int8-torchao, fp8-torchao, with commas; else as configured.",
)
@click.option("--force", is_flag=True, help="Keep what loses too much of the score, or is no faster or smaller.")
@click.option(
    "--vocabulary", type=click.Choice(["teacher", "corpus"]), help="See export.vocabulary; else as configured."
)
@click.option("--push", metavar="OWNER/NAME", help="Then commit it to this repository at the hub.")
@click.option("--private", is_flag=True, help="A private one.")
@_json
def export(
    run_dir: Path, formats: str | None, force: bool, vocabulary: Any, push: str | None, private: bool, as_json: bool
) -> None:  # fmt: skip
    """Write the student as what is deployed. RUN: the directory of a run."""
    from raydistil import pipeline, tables
    from raydistil.export import formats_of
    from raydistil.export.push import repository_of

    if private and push is None:
        raise click.UsageError("--private is of a repository: name one with --push OWNER/NAME")
    asked, to = formats_of(formats), None if push is None else repository_of(push, private)
    _emit(lambda: pipeline.export_run(run_dir, asked, force, _say, vocabulary, to), as_json, tables.show_export)


@app.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--replicas", default=2, show_default=True, type=click.IntRange(min=1), help="Most replicas.")
@click.option("--least", default=1, show_default=True, type=click.IntRange(min=0), help="Fewest; 0: none when idle.")
@click.option(
    "--backend", type=_backend, default="auto", show_default=True,
    help="What replicas run with; auto: the fastest that says what the checkpoint says.",
)  # fmt: skip
@click.option(
    "--calm", default=60.0, show_default=True, type=click.FloatRange(min=0),
    help="Seconds for which fewer replicas must be enough before one is stopped.",
)  # fmt: skip
@click.option("--cpus", default=1, show_default=True, type=click.IntRange(min=1), help="Of each replica: its threads.")
@click.option("--gpus", default=0.0, type=click.FloatRange(min=0), help="Of each replica; .25: four share one.")
@click.option("--keys", help="File of API keys; else everybody may ask.")
@click.option("--teacher", metavar="DIR", help="For --shadow and --cascade; the run's own, if left out.")
@click.option("--shadow", default=0.0, type=_share, help="Share of requests that the teacher answers, too, unheard.")
@click.option("--cascade", type=_share, help="Accuracy to reach: texts the student is not sure of are the teacher's.")
@click.option(
    "--canary", metavar="DIR", help="Another student, which answers a share of the requests while it does well."
)
@click.option("--canary-share", default=0.1, show_default=True, type=_share, help="Of the requests.")
@click.option("--most-errors", default=0.01, show_default=True, type=_share, help="Of the canary, or it goes.")
@click.option(
    "--most-disagreement", default=0.1, show_default=True, type=_share,
    help="Of the canary with the student, or it goes.",
)  # fmt: skip
@click.option("--yaml", "as_yaml", is_flag=True, help="Serve nothing: print what `serve deploy` takes.")
def serve(
    run_dir: Path, host: str, port: int, replicas: int, least: int, backend: Any, calm: float, cpus: int, gpus: float,
    keys: str | None, teacher: str | None, shadow: float, cascade: float | None, canary: str | None,
    canary_share: float, most_errors: float, most_disagreement: float, as_yaml: bool,
) -> None:  # fmt: skip
    """Answer over HTTP on Ray Serve until Ctrl-C. RUN_DIR: a finished run, or a model directory."""
    from raydistil.serve.canary import Limits
    from raydistil.serve.run import config_file, serve_forever
    from raydistil.serve.served import Replicas, Wishes

    if least > replicas:
        raise click.UsageError(f"--least: expected at most the {replicas} of --replicas, got {least}")
    if gpus > 1 and gpus != int(gpus):
        raise click.UsageError(f"--gpus: expected a part of one GPU, or whole ones, got {gpus:g}")
    if teacher is not None and not shadow and cascade is None:
        raise click.UsageError("--teacher: expected something for it to do: add --shadow SHARE or --cascade ACCURACY")
    limits, count = Limits(most_errors, most_disagreement), Replicas(least, replicas, calm, cpus, gpus)
    wishes = Wishes(str(run_dir), count, backend, keys, teacher, shadow, None, canary, canary_share, limits)
    if cascade is not None:
        from raydistil.serve.cascade import with_cascade

        wishes = with_cascade(wishes, cascade, _say)
    if as_yaml:
        sys.stdout.write(config_file(wishes, host, port))
    else:
        serve_forever(wishes, host, port, _say)


@app.command()
@click.argument("name")
@click.option("--file", "path", default=Path("keys.txt"), show_default=True, type=click.Path(path_type=Path))
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Requests a second, of each replica.")
def key(name: str, path: Path, rate: float | None) -> None:
    """Make an API key for serve --keys: it is printed once, the file holds its hash."""
    from raydistil.serve.keys import add_key

    sys.stdout.write(add_key(path, name, rate) + "\n")


@app.group()
def bench() -> None:
    """Measure what the README claims."""


@bench.command("losses")
@click.option("--width", "widths", multiple=True, type=click.IntRange(min=1), default=(768, 384), show_default=True)
@click.option("--positions", default=2048, show_default=True, type=click.IntRange(min=1))
@click.option("--vocabulary", default=30_522, show_default=True, type=click.IntRange(min=2))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", default=None, type=click.IntRange(min=1), help="Of torch; all cores if left out.")
@_json
def bench_losses(
    widths: tuple[int, ...], positions: int, vocabulary: int, rounds: int, threads: int | None, as_json: bool
) -> None:
    """The chunked pass over the vocabulary against plain PyTorch: time and peak memory."""
    from raydistil import plan, tables
    from raydistil.bench import losses

    used = threads or plan.cores()
    _emit(lambda: losses.bench_losses(widths, positions, vocabulary, rounds, used, _say), as_json, tables.show_losses)


@bench.command("fidelity")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="train, validation and test.jsonl.")
@click.option("--output", default=Path("runs/fidelity"), show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--only", type=click.Choice(["default"]), help="The default recipe alone, at 3 and 2 layers.")
@_json
def bench_fidelity(data: Path, output: Path, seeds: int, only: str | None, as_json: bool) -> None:
    """What each loss is worth in task distillation; goes on where it stopped."""
    from raydistil import tables
    from raydistil.bench import fidelity

    _emit(lambda: fidelity.bench_fidelity(data, output, seeds, only is not None, _say), as_json, tables.show_fidelity)


@bench.command("stream")
@click.option("--model", type=click.Choice(["minilm", "base"]), default="minilm", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--output", default=Path("runs/stream"), show_default=True, type=click.Path(path_type=Path))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--texts", default=1200, show_default=True, type=click.IntRange(min=64), help="That a stream is made of.")
@click.option("--steps", default=16, show_default=True, type=click.IntRange(min=1), help="Of each loop in a round.")
@click.option("--warm-up", default=24, show_default=True, type=click.IntRange(min=1), help="Micro-batches not counted.")
@_json
def bench_stream(
    model: Any, device: Any, output: Path, rounds: int, texts: int, steps: int, warm_up: int, as_json: bool
) -> None:
    """The stream against loops in one process, in turn: tokens a second, waits, bytes, time to the first step."""
    from raydistil import tables
    from raydistil.bench import stream

    setting = stream.Setting(model, device, output, rounds, texts, steps, warm_up)
    _emit(lambda: stream.bench_stream(setting, _say), as_json, tables.show_stream)


@bench.command("scale")
@click.option("--output", default=Path("runs/scale"), show_default=True, type=click.Path(path_type=Path))
@click.option("--teachers", "counts", multiple=True, default=(1, 2, 4, 8), show_default=True, type=click.IntRange(1))
@click.option("--teacher-ms", default=200.0, show_default=True, type=click.FloatRange(1), help="Its sleep.")
@click.option("--student-ms", default=40.0, show_default=True, type=click.FloatRange(1), help="Its sleep.")
@click.option("--seconds", default=12.0, show_default=True, type=click.FloatRange(1), help="That each is watched.")
@click.option("--tflops", default=989.0, show_default=True, type=click.FloatRange(1), help="Of a GPU, assumed.")
@click.option("--mfu", default=0.4, show_default=True, type=click.FloatRange(0.01, 1), help="Of them in use, assumed.")
@click.option("--network-gbit", default=400.0, show_default=True, type=click.FloatRange(1), help="Of a node, assumed.")
@click.option("--gpu-hour", default=2.5, show_default=True, type=click.FloatRange(0), help="Price, assumed.")
@_json
def bench_scale(
    output: Path, counts: tuple[int, ...], teacher_ms: float, student_ms: float, seconds: float, tflops: float,
    mfu: float, network_gbit: float, gpu_hour: float, as_json: bool,
) -> None:  # fmt: skip
    """The stream with more and more teachers that sleep, on several nodes; then a large cluster on paper."""
    from raydistil import tables
    from raydistil.bench import paper, scale

    timers = scale.Timers(teacher_ms / 1000, student_ms / 1000, scale.BLOCK_BYTES, seconds)
    assumed = scale.Assumed(tflops * 1e12, mfu, scale.TOKENS, scale.AHEAD)
    machines = paper.Machines(8, network_gbit / 8 * 1e9, 0.0, gpu_hour)
    _emit(lambda: scale.bench_scale(output, timers, counts, assumed, machines, _say), as_json, tables.show_scale)


@bench.command("chaos")
@click.option("--output", default=Path("runs/chaos"), show_default=True, type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the schedule and the run.")
@click.option("--students", default=1, show_default=True, type=click.IntRange(min=1), help="Student workers.")
@click.option("--quick", is_flag=True, help="One kill of each kind.")
@_json
def bench_chaos(output: Path, seed: int, students: int, quick: bool, as_json: bool) -> None:
    """A run whose processes and nodes are killed all the time: nothing lost, nothing twice. Exit code 1 otherwise."""
    from raydistil import tables
    from raydistil.bench import chaos

    setting, results = chaos.Setting(output, seed, students, chaos.QUICK if quick else chaos.FULL), list[Result]()

    def work() -> Result:
        results.append(chaos.bench_chaos(setting, _say))
        return results[0]

    _emit(work, as_json, tables.show_chaos)
    if not results[0]["passed"]:
        raise FailedError(f"expected nothing lost and nothing twice, and as many kills as planned: see {output}")


@bench.command("serve")
@click.argument("run_dir", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@click.option("--output", default=Path("runs/serve"), show_default=True, type=click.Path(path_type=Path))
@click.option("--backend", type=_backend, default="auto", show_default=True, help="What all servers run.")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(min=1), help="Of each server.")
@click.option("--cpus", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of each model.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(min=1), help="Of each load.")
@click.option("--deadline-ms", default=1000.0, show_default=True, type=click.FloatRange(min=1), help="Of a request.")
@click.option("--soak", default=0.0, show_default=True, help="Seconds of steady load, while memory is watched.")
@click.option("--peer", metavar="URL", help="Another server's embeddings, as OpenAI's: http://HOST:PORT/embeddings.")
@_json
def bench_serve(
    run_dir: Path | None, output: Path, backend: Any, replicas: int, cpus: int, rounds: int, seconds: float,
    deadline_ms: float, soak: float, peer: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Requests a second and latency of the server beside others of the same model. Without RUN: 3 layers of MiniLM."""
    from raydistil import tables
    from raydistil.bench import serve

    setting = serve.Setting(run_dir, output, backend, replicas, cpus, rounds, seconds, deadline_ms, soak, peer)
    _emit(lambda: serve.bench_serve(setting, _say), as_json, tables.show_serve)


def main() -> None:
    """Entry point: turns errors into exit codes."""
    sys.exit(_guarded(sys.argv[1:]))


def _guarded(arguments: list[str]) -> int:
    try:
        return int(app.main(arguments, prog_name="raydistil", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        _say(error.format_message())
        return 2
    except click.ClickException as error:
        _say(f"error: {error.format_message()} (see raydistil --help)")
        return 2
    except RaydistilError as error:
        _say("error: " + " ".join(str(error).split()))
        return error.exit_code
    except Interrupted as error:
        _say(f"interrupted: {error}")
        return 130
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted: nothing of this run is left running; the same command goes on from the last checkpoint")
        return 130
    except Exception as error:
        traceback.print_exc()
        _say(f"failed: {type(error).__name__}: {error}")
        return 1
