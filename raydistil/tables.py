"""What people see on stdout."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_report(report: dict[str, Any]) -> None:
    """The table of a run: one line a model."""
    console = Console()
    if "models" not in report:
        for key, value in report.items():
            console.print(f"{key}: {value}", markup=False, highlight=False)
        return
    console.print(_models(report))
    if "wall_s" in report:
        console.print(
            f"student in {report['student_dir']}, {report['wall_s']:.0f} s in all", markup=False, highlight=False
        )


def _models(report: dict[str, Any]) -> Table:
    """One column a model, so that it fits a narrow terminal."""
    models = report["models"]
    score = models[0]["score"]
    table = Table(title=f"{score['metric']} on {score['rows']:,} test items", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(model["name"], justify="right")
    for name, cells in _rows(models):
        if any(cells):
            table.add_row(name, *cells)
    return table


def _rows(models: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(heading, one cell a model); a cell is empty where nothing was measured."""
    scores = [model["score"] for model in models]
    latencies = [model["latency_p50_ms"] for model in models]
    first = scores[0]["value"]
    return [
        ("parameters", [f"{model['parameters'] / 1e6:.1f} M" for model in models]),
        ("MFLOPs/token", [f"{model['flops_per_token'] / 1e6:.1f}" for model in models]),
        ("size on disk", [f"{model['size_bytes'] / 2**20:.0f} MiB" for model in models]),
        ("MLM loss (nats)", [_number(model["mlm_loss"], ".4f") for model in models]),
        ("CLM loss (nats)", [_number(model["clm_loss"], ".4f") for model in models]),
        ("perplexity", [_number(model["perplexity"], ".2f") for model in models]),
        ("Pearson", [_number(model["pearson"], ".4f") for model in models]),
        ("RMSE", [_number(model["rmse"], ".4g") for model in models]),
        ("word accuracy", [_number(model["accuracy"], ".4f") for model in models]),
        ("exact match", [_number(model["exact_match"], ".4f") for model in models]),
        ("score", [f"{score['value']:.4f}" for score in scores]),
        ("95 % interval", [f"{score['low']:.3f} to {score['high']:.3f}" for score in scores]),
        ("retention", [f"{score['value'] / first:.3f}" if first else "" for score in scores]),
        ("latency p50 (1 thread)", [_number(latency, ".1f", " ms") for latency in latencies]),
        ("speed-up", [_number(latency and latencies[0] / latency, ".2f", "x") for latency in latencies]),
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def show_export(result: dict[str, Any]) -> None:
    """A line a file."""
    console = Console()
    if result["artefacts"]:
        first = result["artefacts"][0]
        score, split = first["score"], first["split"]
        title = f"{score['metric']} on {score['rows']:,} {split} items; one thread, real texts; x: of {first['format']}"
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=0, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in ("MiB", "x", "score", "p50 (ms)", "p99", "texts/s", "x", "memory", "off by"):
            table.add_column(heading, justify="right", no_wrap=True)
        for made in result["artefacts"]:
            table.add_row(*_artefact(made, first))
        console.print(table)
    console.print(f"student in {result['student_dir']}", markup=False, highlight=False)


def _artefact(made: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a file, with its size and its speed beside those of the first, the model in PyTorch."""
    return (
        made["format"], f"{made['bytes'] / 2**20:.1f}", f"{made['bytes'] / first['bytes']:.2f}",
        f"{made['score']['value']:.4f}", f"{made['latency_p50_ms']:.1f}", f"{made['latency_p99_ms']:.1f}",
        f"{made['rows_s']:.1f}", f"{made['rows_s'] / first['rows_s']:.2f}", f"{made['peak_mib']:.0f} MiB",
        _number(made["difference"], ".1e"),
    )  # fmt: skip


def show_fidelity(result: dict[str, Any]) -> None:
    """A line a recipe: scores of both splits and what is kept of the teacher's."""
    title = f"teacher {_spread(result['teacher_score'], result['teacher_score_sd'])} on the test split, "
    table = Table(title=title + f"{result['seeds']} seeds", box=SIMPLE_HEAD, title_justify="left")
    for heading in ("recipe", "layers", "validation", "test", "retention"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in result["rows"]:
        spreads = [_spread(**row[name]) for name in ("validation", "test", "test_retention")]
        table.add_row(row["name"], str(row["layers"]), *spreads)
    Console().print(table)


def _spread(mean: float, sd: float | None) -> str:
    return f"{mean:.4f}" if sd is None else f"{mean:.4f} ± {sd:.4f}"


def show_losses(result: dict[str, Any]) -> None:
    """Time and memory of both sides, a line each width and precision."""
    title = f"KD and cross-entropy, {result['positions']:,} positions x {result['vocabulary']:,}, {result['device']}"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for heading in ("width", "precision", "plain", "chunked", "faster", "plain peak", "chunked peak", "memory"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["width"]), row["precision"], f"{row['plain_s']:.2f} s", f"{row['chunked_s']:.2f} s",
            f"{row['speedup']:.2f}x", f"{row['plain_peak_mib']:,.0f} MiB", f"{row['chunked_peak_mib']:,.0f} MiB",
            f"{row['memory_share']:.2f}",
        )  # fmt: skip
    Console().print(table)


def show_stream(result: dict[str, Any]) -> None:
    """A column a precision; what is of the whole below."""
    title = f"{result['model']} on {result['device']}, {result['threads']} threads, {result['rounds']} rounds"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for row in result["rows"]:
        table.add_column(row["precision"], justify="right")
    for name, key, form in STREAM_ROWS:
        if all(key in row for row in result["rows"]):
            table.add_row(name, *(f"{row[key]:{form}}" for row in result["rows"]))
    console = Console()
    console.print(table)
    line = f"published loop, float32: {result['reference_tok_s']:,.0f} tok/s; the stream is "
    line += f"{result['ratio_vs_reference']:.2f}x as fast, {result['ratio_vs_reference_same_dtype']:.2f}x in float32"
    console.print(line, markup=False, highlight=False)
    if not result["honest_windows"]:
        warning = "in a window the teacher's rows and the student's differ by over 5 %: raise --texts and --warm-up"
        console.print(warning, markup=False, highlight=False)


def show_serve(result: dict[str, Any]) -> None:
    """A line a server and rate; what is of the whole below."""
    title = f"{result['model']} with {result['backend']}, {result['mean_tokens']:.0f} tokens a text, "
    title += f"{result['replicas']} replicas, deadline {result['deadline_ms']:g} ms"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", padding=0, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("offered/s", "served/s", "p50 (ms)", "p95", "p99", "refused", "unanswered", "5xx"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, arm in result["arms"].items():
        for rate in arm["rates"]:
            cells = [f"{rate[key]:.0f}" for key in ("offered", "served")]
            cells += [f"{rate[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms")]
            table.add_row(name, *cells, *(str(rate[key]) for key in ("rejected", "unanswered", "errors_5xx")))
    console = Console()
    console.print(table)
    ratios = ", ".join(f"{value:.2f}x {key[9:]}" for key, value in result.items() if key.startswith("ratio_vs_"))
    line = f"{result['saturation_rps']:.0f} requests a second at most: {ratios}; idle, "
    line += f"{result['overhead_p50_ms']:.1f} ms more than the {result['in_process_p50_ms']:.1f} ms in process"
    console.print(line, markup=False, highlight=False)


STREAM_ROWS = (
    ("streamed tok/s", "streamed_tok_s", ",.0f"),
    ("in-process tok/s", "inprocess_tok_s", ",.0f"),
    ("student alone tok/s", "student_only_tok_s", ",.0f"),
    ("streamed / in-process", "ratio_vs_inprocess", ".3f"),
    ("streamed / student alone", "ratio_vs_student_only", ".3f"),
    ("share of the matrix products' rate", "roofline_fraction", ".2f"),
    ("the same, in-process", "inprocess_roofline_fraction", ".2f"),
    ("student waited", "wait_fraction", ".1%"),
    ("half the cores each: tok/s", "apart_tok_s", ",.0f"),
    ("half the cores each: / in-process", "apart_ratio_vs_inprocess", ".3f"),
    ("half the cores each: student waited", "apart_wait_fraction", ".1%"),
    ("teacher rows / student rows", "window_balance", ".3f"),
    ("bytes a token on the wire", "wire_bytes_per_token", ",.0f"),
    ("bytes through the driver", "driver_payload_bytes", ",.0f"),
    ("most bytes in the object store", "peak_store_bytes", ",.0f"),
    ("first step after (s)", "time_to_first_step_s", ".1f"),
    ("teachers built", "teacher_builds", "d"),
)


def show_scale(result: dict[str, Any]) -> None:
    """Part (a), then part (b) with what it rests on."""
    timers, console = result["timers"], Console()
    title = f"{result['nodes']} nodes, teachers of {timers['teacher_s'] * 1000:.0f} ms, a student of "
    table = Table(title=title + f"{timers['student_s'] * 1000:.0f} ms", box=SIMPLE_HEAD, title_justify="left")
    for heading in ("teachers", "micro-batches/s", "expected", "share", "binds", "student waited"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['fewest']} to {row['teachers']}", f"{row['micro_batches_s']:.1f}", f"{row['expected']:.1f}",
            f"{row['share']:.2f}", row["binds"], f"{row['wait_fraction']:.0%}",
        )  # fmt: skip
    console.print(table)
    assumed = result["assumed"]
    title = f"on paper: BERT-base to DistilBERT, GPUs of {assumed['gpu_flops_s'] / 1e12:,.0f} TFLOPs at "
    title += (
        f"{assumed['used']:.0%}, {assumed['network_bytes_s'] / 1e9:.0f} GB/s a node (assumed); the scheduler takes "
    )
    title += f"{result['scheduler_s'] * 1000:.2f} ms a micro-batch, a store {assumed['store_bytes_s'] / 1e9:.1f} GB/s"
    paper = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for heading in ("GPUs", "T + S", "tok/s", "binds", "scheduler", "store", "network", "1e9 tokens"):
        paper.add_column(heading, justify="right")
    for row in result["paper"]:
        shares = [f"{row[name]:.0%}" for name in ("scheduler_share", "store_share", "network_share")]
        split, cost = f"{row['teachers']} + {row['students']}", f"{row['cost_per_billion_tokens']:.2f}"
        paper.add_row(str(row["gpus"]), split, f"{row['tok_s'] / 1e6:.2f} M", row["binds"], *shares, cost)
    console.print(paper)


def show_chaos(result: dict[str, Any]) -> None:
    """What was killed, and what came of it."""
    table = Table(title="killed, and gone on", box=SIMPLE_HEAD, title_justify="left", show_header=False)
    kinds = ", ".join(f"{count} {kind}" for kind, count in result["kills_by_kind"].items())
    same = "yes, bit for bit" if result["same_weights"] else "no"
    for what, found in (
        ("kills", f"{result['kills']} ({kinds})"),
        ("starts", f"{result['resumes'] + 1} of the driver, {result['worker_starts']} of the student workers"),
        ("teachers built", str(result["teachers_built"])),
        ("texts to train on", f"{result['positions_expected']:,}"),
        ("trained on", f"{result['positions_trained']:,}"),
        ("lost", f"{result['lost']:,}"),
        ("trained on twice", f"{result['duplicated']:,}"),
        ("an audit of a spoilt trace tells", "yes" if result["audit_control"] else "no"),
        ("final loss", f"{result['final_loss']:.6f}"),
        ("without kills", f"{result['uninterrupted_final_loss']:.6f}"),
        ("the same micro-batches in each step", "yes" if result["same_steps"] else "no"),
        ("the same weights", same),
        ("steps done again", f"{result['steps_repeated']:,} of {result['steps']:,}"),
        ("seconds", f"{result['wall_s']:.0f}, {result['uninterrupted_wall_s']:.0f} without kills"),
    ):
        table.add_row(what, found)
    Console().print(table)


def show_check(result: dict[str, Any]) -> None:
    """Configuration with origins, sample, models, data, plan."""
    console = Console()
    table = Table(title="configuration")
    for heading in ("key", "value", "from"):
        table.add_column(heading, overflow="fold")
    for row in result["config"]:
        table.add_row(row["key"], escape(str(row["value"])), row["origin"])
    console.print(table)
    for example in result["examples"]:
        console.print(f"[bold]{escape(example['source'])}[/bold] {escape(example['label'] or '')}", highlight=False)
        console.print("  " + example["text"], markup=False, highlight=False)
        console.print("  " + " ".join(example["tokens"]), style="dim", markup=False, highlight=False)
    sizes = [f"{name}: {size['text']}" for name, size in result["models"].items()]
    for line in (*sizes, *result["data"], *result["plan"]):
        console.print(line, markup=False, highlight=False)


def show_doctor(result: dict[str, Any]) -> None:
    """One line a finding; what stands in the way of a run is marked."""
    console = Console()
    for finding in result["findings"]:
        mark = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "bad": "[red]bad [/red]"}
        console.print(
            f"{mark[finding['state']]} {finding['what']:<16} {escape(str(finding['found']))}", highlight=False
        )
        if finding["advice"]:
            console.print(f"     -> {finding['advice']}", markup=False, highlight=False)
