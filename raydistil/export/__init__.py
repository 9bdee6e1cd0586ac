"""export: the student as what people deploy, in one directory that appears whole or not at all.

hf      config, tokenizer, weights, model card: loads with transformers alone
bf16    model.bf16.safetensors beside its weights: from_pretrained(.., variant="bf16")
onnx    onnx/model.onnx beside them, where users of onnxruntime and transformers.js look for it
fp16    onnx/model_fp16.onnx: the same with weights and products in float16
int8    onnx/model_int8.onnx: the same with weights and embeddings in 8 bits
int8-static  onnx/model_int8_static.onnx: activations too, in ranges found on training rows
int8-torchao, fp8-torchao  directories of these names: from_pretrained(.., subfolder="int8-torchao"), for GPUs

What loses more than `MOST_LOST` of the score on the validation rows (those of the test where there are none), is no
smaller than what it was made from, or, of 8 bits, no faster, is refused. card.py writes the model card, onnx.py and
smaller.py the files, measure.py finds out what they are worth; vocabulary.py cuts the vocabulary where that is asked
for, before any of these.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from raydistil import rundir
from raydistil.config import Config, EvaluateConfig, config_of
from raydistil.errors import ExportError, StorageError
from raydistil.evaluate import judged
from raydistil.export.card import facts_of, model_card, published
from raydistil.export.measure import ROWS, Artefact, Runtime, Speed, difference, load, real_rows, speeds
from raydistil.export.onnx import to_onnx
from raydistil.export.sentences import write_layout
from raydistil.export.smaller import to_bf16, to_fp16, to_int8, to_int8_static, to_torchao
from raydistil.export.vocabulary import Cut, check_cut, cut_line, cut_vocabulary, weighed
from raydistil.models import load_model, outline, shape_of
from raydistil.plan import cores
from raydistil.prepare import Prepared
from raydistil.specs import EvaluateSpec
from raydistil.storage import whole_directory
from raydistil.tokens import TokenStore
from raydistil.types import IN_TORCH, TORCHAO, Format, Score, Split, Vocabulary, takes_labels

NEEDED = ("config.json", "model.safetensors", "tokenizer.json")
ONNX = Path("onnx", "model.onnx")
FILES: dict[Format, Path] = {
    "hf": Path("model.safetensors"), "bf16": Path("model.bf16.safetensors"), "onnx": ONNX,
    "fp16": Path("onnx", "model_fp16.onnx"), "int8": Path("onnx", "model_int8.onnx"),
    "int8-static": Path("onnx", "model_int8_static.onnx"),
    "int8-torchao": Path("int8-torchao", "model.safetensors"), "fp8-torchao": Path("fp8-torchao", "model.safetensors"),
}  # fmt: skip
MADE_OF: dict[Format, Format] = {
    "bf16": "hf", "fp16": "onnx", "int8": "onnx", "int8-static": "onnx", "int8-torchao": "hf", "fp8-torchao": "hf",
}  # fmt: skip
# Halves are for their bytes: whether they are faster hangs on the machine.
FASTER: tuple[Format, ...] = ("int8", "int8-static", *TORCHAO)
MOST_LOST = 0.005  # of a score between 0 and 1
NEAR = 1e-4  # what float32 logits may differ by
BATCH = 8
CALIBRATION = 256  # training rows that ranges are found on


@dataclass(frozen=True, slots=True)
class Made:
    """One exported artefact and what it is worth."""

    format: Format
    file: str
    bytes: int
    difference: float | None  # of logits from the PyTorch model's; None: that is it
    split: Split  # that it was scored on
    score: Score
    speed: Speed


def formats_of(text: str | None) -> tuple[Format, ...]:
    """Of `--to`; none where it is left out. Raises ExportError for one that is unknown."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    known: tuple[Format, ...] = get_args(Format)
    for name in names:
        if name not in known:
            raise ExportError(f"--to: expected some of {', '.join(known)}, with commas between, got {name!r}")
    return tuple(name for name in known if name in names)


def export(
    run: Prepared, report: dict[str, Any], formats: tuple[Format, ...], force: bool = False,
    vocabulary: Vocabulary = "teacher", name: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write run_dir/student; `name`: of the repository at the hub that it is for.

    Returns {student_dir, artefacts: one of each format that was measured, and vocabulary: where it was cut}.

    Raises StorageError where there is nothing to export, ExportError for a format that the student cannot have,
    or another task's checkpoint.
    """
    source, target = run.run_dir / rundir.DISTILLED, run.run_dir / rundir.STUDENT
    missing = [name for name in NEEDED if not (source / name).exists()]
    if missing:
        raise StorageError(f"expected a distilled student at {source}, {missing[0]} is not there: run distill first")
    _check_task(source, run)
    with whole_directory(target) as scratch:
        shutil.copytree(source, scratch, dirs_exist_ok=True)
        if run.config.task == "embedding":
            shape = shape_of(str(source), "student")
            write_layout(scratch, shape.pooling, shape.hidden_size, run.config.tokens.length)
        used, cut = _cut(run, report, scratch, force) if vocabulary == "corpus" else (run, {})
        made = [_row(each) for each in _files(used, scratch, formats, force)] if set(formats) - {"hf"} else []
        before = {key: value for key, value in report.items() if key not in ("artefacts", "vocabulary")}
        known = {**before, "artefacts": made, "pairs": run.store.meta.pairs, **cut}
        card = model_card(facts_of(run_config(run.run_dir), run, known), name)
        (scratch / "README.md").write_text(card, encoding="utf8")
        rundir.write_json(scratch / "raydistil.json", published(known))
    return {"student_dir": str(target), "artefacts": made} | {key: cut[key] for key in cut if key == "vocabulary"}


def _cut(
    run: Prepared, report: dict[str, Any], folder: Path, force: bool
) -> tuple[Prepared, dict[str, Any]]:  # fmt: skip
    """The student in `folder` in the words of its corpus: (the run in them, what of the report it changes)."""
    before = weighed(folder, held_out(run))
    used = cut_vocabulary(run, folder)
    spec = held_out(used)
    after = weighed(folder, spec)
    sizes = run.store.meta.vocab_size, used.store.meta.vocab_size
    cut = Cut(sizes, (before.size_bytes, after.size_bytes), spec.split, (before.score, after.score))
    if not force:
        check_cut(cut, MOST_LOST)
    run.say(f"vocabulary: {cut_line(asdict(cut))}")
    models = [asdict(weighed(folder, replace(spec, split="test")))] if "models" in report else []
    return used, {"vocabulary": asdict(cut)} | ({"models": [*report["models"], *models]} if models else {})


def _check_task(source: Path, run: Prepared) -> None:
    """Raise ExportError for a checkpoint with another head than the run's: loading it would make one at random."""
    task, key = run.config.task, f"the distilled student at {source}"
    shape, expected = shape_of(str(source), key), type(outline(str(source), task, key=key)).__name__
    found = (shape.architectures or ["none"])[0]
    if found != expected:
        raise ExportError(f"{source}: expected a {expected} for the run's {task}, got {found}: run distill again")
    classes = len(run.labels) or 1
    if (run.labels or task == "regression") and shape.num_labels != classes:
        raise ExportError(
            f"{source}: expected a head of {classes} for the run's {task}, got one of {shape.num_labels}: "
            f"run distill again"
        )


def _row(made: Made) -> dict[str, Any]:
    speed = asdict(made.speed)
    return {**{key: value for key, value in asdict(made).items() if key != "speed"}, **speed}


def _files(run: Prepared, folder: Path, formats: tuple[Format, ...], force: bool) -> list[Made]:
    """Write the files of `formats` to `folder`, and measure them beside the model in PyTorch."""
    if run.config.task == "clm" and set(formats) - IN_TORCH:
        raise ExportError(
            f"expected a model of whole texts or masked tokens for ONNX, got a causal one: export it as "
            f"{', '.join(sorted(IN_TORCH))}"
        )
    spec, written = held_out(run), [name for name in FILES if name in {"hf", *formats, *map(MADE_OF.get, formats)}]
    for name in written:
        _write(name, folder, spec)
    made = list(_measured(spec, {name: _artefact(name, folder) for name in written}, folder))
    if not force:
        _check({each.format: each for each in made})
    if "onnx" not in formats:
        (folder / ONNX).unlink(missing_ok=True)
    return [each for each in made if each.format in (*formats, "hf")]


def _write(name: Format, folder: Path, spec: EvaluateSpec) -> None:
    path = folder / FILES[name]
    if name == "bf16":
        to_bf16(folder / FILES["hf"], path)
    elif name in TORCHAO:
        to_torchao(folder, path.parent, spec.task, name)
    elif name == "onnx":
        path.parent.mkdir()
        model, pairs = load_model(str(folder), spec.task, spec.labels), TokenStore(spec.store).meta.pairs
        to_onnx(model, spec.task, path, pairs)
    elif name == "fp16":
        to_fp16(folder / ONNX, path)
    elif name == "int8":
        to_int8(folder / ONNX, path)
    elif name == "int8-static":
        to_int8_static(folder / ONNX, path, real_rows(replace(spec, split="train"), CALIBRATION))


def _artefact(name: Format, folder: Path) -> Artefact:
    if name in TORCHAO:
        return Artefact(name, "torchao", (folder / FILES[name]).parent)
    runtimes: dict[Format, Runtime] = {"hf": "torch", "bf16": "torch-bf16"}
    return Artefact(name, runtimes[name], folder) if name in runtimes else Artefact(name, "onnx", folder / FILES[name])


def held_out(run: Prepared) -> EvaluateSpec:
    """On the validation rows; where there are none, on the test rows."""
    config, store = run.config, TokenStore(run.store.path)
    splits: tuple[Split, ...] = ("validation", "test")
    full = [split for split in splits if sum(store.bucket_rows(split, labelled=takes_labels(config.task)))]
    if not full:
        raise ExportError(
            "expected validation rows to check what is exported on, got none: set corpus.validation_share or test_share"
        )
    return EvaluateSpec(
        config.task, store.path, full[0], config.masking if config.task == "mlm" else None, run.labels,
        "float32", EvaluateConfig(batch_size=BATCH), cores(),
    )  # fmt: skip


def _measured(spec: EvaluateSpec, artefacts: dict[Format, Artefact], folder: Path) -> Iterator[Made]:
    """Raises ExportError for one that says what is no number."""
    rows = real_rows(spec, ROWS)
    speed = speeds(list(artefacts.values()), spec, threads=1, at_once=BATCH)
    reference = load(artefacts["hf"], spec.task, spec.labels, spec.threads)
    for name, each in artefacts.items():
        model = reference if name == "hf" else load(each, spec.task, spec.labels, spec.threads)
        off = None if name == "hf" else difference(model, reference, rows, each.device, artefacts["hf"].device)
        if off is not None and not math.isfinite(off):
            raise ExportError(f"{name}: expected logits that are numbers, got {off} for some: leave {name} out of --to")
        score, _ = judged([(model, 1.0)], spec, each.device)
        size = (folder / FILES[name]).stat().st_size
        yield Made(name, str(FILES[name]), size, off, spec.split, score, speed[name])


def _check(found: dict[Format, Made]) -> None:
    """Raise ExportError for what says something else than the model, or is not worth having."""
    off = found["onnx"].difference if "onnx" in found else None
    if off is not None and off > NEAR:
        raise ExportError(f"onnx: expected logits within {NEAR:g} of the PyTorch model's, got {off}: export it as hf")
    for name, source in MADE_OF.items():
        if name in found:
            _check_smaller(found[name], found[source])


def _check_smaller(small: Made, exact: Made) -> None:
    name, lost = small.format, exact.score.value - small.score.value
    way_out = f"leave {name} out of --to, or take it as it is with --force"
    if not lost <= MOST_LOST:  # nor nan
        raise ExportError(
            f"{name}: expected at most {MOST_LOST} of the {exact.score.metric} lost on {exact.score.rows:,} "
            f"{exact.split} items, got {lost:.4f} ({exact.score.value:.4f} to {small.score.value:.4f}): {way_out}"
        )
    if small.bytes >= exact.bytes:
        raise ExportError(
            f"{name}: expected less than the {exact.bytes:,} bytes of float32, got {small.bytes:,}: {way_out}"
        )
    if name in FASTER and small.speed.rows_s <= exact.speed.rows_s:
        raise ExportError(
            f"{name}: expected more than the {exact.speed.rows_s:.1f} texts a second of float32 on this machine, got "
            f"{small.speed.rows_s:.1f}: {way_out}"
        )


def run_config(run_dir: Path) -> Config:
    """Of a run, as it was resolved, wherever its directory is now. Raises StorageError where there is none."""
    kept = rundir.read_config(run_dir)
    if kept is None:
        raise StorageError(f"expected the directory of a run with its {rundir.CONFIG}, found none at {run_dir}")
    path = run_dir.resolve()
    return config_of({**kept, "output_dir": str(path.parent), "name": path.name})
