"""What people see on stdout."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def show_report(report: dict[str, Any]) -> None:
    """The table of a run: one line a model."""
    console = Console()
    if "models" not in report:
        for key, value in report.items():
            console.print(f"{key}: {value}", highlight=False)
        return
    console.print(_models(report))
    console.print(f"retention {report['retention'] or 0:.3f}, speed-up {report['speedup']:.2f}x", highlight=False)
    if "wall_s" in report:
        console.print(f"student in {report['student_dir']}, {report['wall_s']:.0f} s in all", highlight=False)


def _models(report: dict[str, Any]) -> Table:
    mlm = any(model["mlm_loss"] is not None for model in report["models"])
    score = report["models"][0]["score"]
    table = Table(title=f"{score['metric']} on {score['rows']:,} test items", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    headings = ["model", "params", "on disk", "score", "95 % interval", "retained", "latency p50", "speed-up"]
    if mlm:
        headings.insert(3, "MLM loss")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right", no_wrap=True)
    for model in report["models"]:
        table.add_row(*_cells(model, report["models"][0], mlm))
    return table


def _cells(model: dict[str, Any], teacher: dict[str, Any], mlm: bool) -> list[str]:
    score, latency = model["score"], model["latency_p50_ms"]
    cells = [model["name"], f"{model['parameters'] / 1e6:.1f} M", f"{model['size_bytes'] / 2**20:.0f} MiB"]
    if mlm:
        cells.append(f"{model['mlm_loss']:.4f}")
    cells += [f"{score['value']:.4f}", f"{score['low']:.3f}-{score['high']:.3f}"]
    cells.append(f"{score['value'] / teacher['score']['value']:.3f}" if teacher["score"]["value"] else "-")
    if latency is None:
        return [*cells, "", ""]
    return [*cells, f"{latency:.1f} ms", f"{teacher['latency_p50_ms'] / latency:.2f}x"]


def show_check(result: dict[str, Any]) -> None:
    """Configuration with origins, sample, data, plan."""
    console = Console()
    table = Table(title="configuration")
    for heading in ("key", "value", "from"):
        table.add_column(heading, overflow="fold")
    for row in result["config"]:
        table.add_row(row["key"], str(row["value"]), row["origin"])
    console.print(table)
    for example in result["examples"]:
        console.print(f"[bold]{example['source']}[/bold] {example['label'] or ''}", highlight=False)
        console.print("  " + example["text"], markup=False, highlight=False)
        console.print("  " + " ".join(example["tokens"]), style="dim", markup=False, highlight=False)
    for line in (*result["data"], *result["plan"]):
        console.print(line, markup=False, highlight=False)


def show_doctor(result: dict[str, Any]) -> None:
    """One line a finding; what stands in the way of a run is marked."""
    console = Console()
    for finding in result["findings"]:
        mark = {"ok": "[green]ok  [/green]", "warn": "[yellow]warn[/yellow]", "bad": "[red]bad [/red]"}
        console.print(f"{mark[finding['state']]} {finding['what']:<16} {finding['found']}", highlight=False)
        if finding["advice"]:
            console.print(f"     -> {finding['advice']}", highlight=False)
