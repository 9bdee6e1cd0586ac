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
from typing import Annotated, Any

import click
import typer

from raydistil.config import Config, load_config
from raydistil.errors import Interrupted, RaydistilError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Distil a transformer: teacher on Ray Data, student on Ray Train with DeepSpeed, endpoint on Ray Serve.",
)  # fmt: skip

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; jobs/ holds examples.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the file.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

Result = dict[str, Any]


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
def run(config: ConfigPath, set_: Set = None, as_json: Json = False) -> None:
    """The whole chain, as the configuration has it."""
    from raydistil import pipeline, tables

    loaded = load_config(config, set_ or [])
    _emit(lambda: pipeline.run_all(loaded, _say), as_json, tables.show_report)


@app.command()
def check(
    config: ConfigPath,
    set_: Set = None,
    show: Annotated[int, typer.Option(help="Examples to show.")] = 3,
    as_json: Json = False,
) -> None:
    """The resolved configuration, a sample of the data and the plan; trains nothing."""
    from raydistil import tables
    from raydistil.check import check as examine

    _emit(lambda: examine(config, set_ or [], show), as_json, tables.show_check)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers: devices, memory, disk, versions, Ray."""
    from raydistil import tables
    from raydistil.doctor import examine

    _emit(examine, as_json, tables.show_doctor)


def _stage(config: Config, name: str, as_json: bool) -> None:
    from raydistil import pipeline, tables

    _emit(lambda: pipeline.run_stage(config, name, _say), as_json, tables.show_report)


@app.command()
def finetune(config: ConfigPath, set_: Set = None, as_json: Json = False) -> None:
    """Teach the teacher the task."""
    _stage(load_config(config, set_ or []), "finetune", as_json)


@app.command()
def distill(config: ConfigPath, set_: Set = None, as_json: Json = False) -> None:
    """Teach the student what the teacher says."""
    _stage(load_config(config, set_ or []), "distill", as_json)


@app.command()
def evaluate(config: ConfigPath, set_: Set = None, as_json: Json = False) -> None:
    """Score teacher and student."""
    _stage(load_config(config, set_ or []), "evaluate", as_json)


@app.command()
def export(config: ConfigPath, set_: Set = None, as_json: Json = False) -> None:
    """Write the student as a Hugging Face directory."""
    _stage(load_config(config, set_ or []), "export", as_json)


@app.command()
def serve(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run, or of a model.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.", min=0, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(help="Most replicas; Serve scales between 1 and this.", min=1)] = 2,
) -> None:
    """Answer over HTTP on Ray Serve until Ctrl-C."""
    from raydistil.serve.run import serve_forever

    serve_forever(run_dir, host, port, replicas, _say)


def main() -> None:
    """Entry point: turns errors into exit codes."""
    sys.exit(_guarded(sys.argv[1:]))


def _guarded(arguments: list[str]) -> int:
    try:
        code = app(arguments, standalone_mode=False)
        return int(code or 0)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        _say(f"error: {error.format_message()} (see raydistil --help)")
        return 2
    except RaydistilError as error:
        _say("error: " + " ".join(str(error).split()))
        return 2
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
