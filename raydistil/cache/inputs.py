"""Everything a teacher's targets depend on: two runs with the same fingerprint may share them, no others.

That is less than a configuration: not the weights of the losses, nor the student, the number of epochs or of mask
variants, but which hidden states and places the losses look at. The token store's name stands for the texts, the
tokenizer and how it cut them.
"""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from raydistil.config.section import Section
from raydistil.config.targets import TargetsConfig
from raydistil.errors import ModelError
from raydistil.heads import pooling_of
from raydistil.models import shape_of, unloadable
from raydistil.specs import SourceSpec, TargetsSpec, TeacherSpec
from raydistil.types import Task, models_language

FORMAT = 1  # raise when the files or the way targets are made change
WEIGHTS = ("*.safetensors", "*.bin", "config.json")


def inputs_of(teacher: TeacherSpec, source: SourceSpec) -> dict[str, Any]:
    """By name; a plain JSON object. Raises ModelError where the teacher's files are not at hand."""
    wanted = teacher.targets
    return said_by(teacher) | {
        "format": FORMAT, "task": teacher.task, "precision": teacher.precision,
        "token_store": source.store.name, "split": source.split, "masking": _plain(source.masking),
        "augment": _plain(source.augment),
        "states": [list(wanted.states), wanted.config.states if wanted.states else None],
        "soft_labels": _soft_labels(wanted), "places": _places(wanted, teacher.task),
        "seed": source.manifest.seed if source.masking or source.augment or _draws(wanted) else None,
    }  # fmt: skip


def said_by(teacher: TeacherSpec) -> dict[str, Any]:
    """What makes it say what it says: its weights, and how its states become a vector, which stands beside them."""
    found = {"teacher": model_hash(teacher.model)}
    if teacher.task == "embedding":
        found["pooling"] = pooling_of(str(_folder(teacher.model)), shape_of(teacher.model, "teacher.model"))
    return found


def model_hash(model: str) -> str:
    """Over the weights and the configuration of a model in hub layout, byte by byte."""
    folder = _folder(model)
    whole = hashlib.blake2b(digest_size=16)
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise ModelError(f"expected weights (.safetensors or .bin) in {folder} to know targets by, found none")
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        whole.update(path.name.encode() + b"\0" + content.digest())
    return whole.hexdigest()


def _folder(model: str) -> Path:
    """Where a model's files are; those of a hub name lie in the hub client's cache, and are fetched if they are not."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.bin", "*.json"]))
    except (OSError, ValueError) as error:
        raise unloadable(model, "model", error, "teacher.model") from error


def _plain(section: Section | None) -> dict[str, Any] | None:
    return None if section is None else section.model_dump(mode="json")


def _draws(wanted: TargetsSpec) -> bool:
    """Whether anything but masks is random."""
    return wanted.soft_labels and (wanted.config.codec == "sampled" or wanted.loss.kd_positions == "sample")


def _soft_labels(wanted: TargetsSpec) -> list[Any] | None:
    """Codec, its size, and the temperature where it is in what is kept."""
    if not wanted.soft_labels:
        return None
    sizes: dict[str, tuple[str, ...]] = {"topk": ("top_k",), "sampled": ("num_draws",)}
    config: TargetsConfig = wanted.config
    if config.codec not in sizes:
        return ["logits"]
    return [config.codec, *(getattr(config, name) for name in sizes[config.codec]), wanted.loss.temperature]


def _places(wanted: TargetsSpec, task: Task) -> list[Any] | None:
    """What decides which tokens have soft labels."""
    if not models_language(task) or not wanted.soft_labels:
        return None
    loss = wanted.loss
    share = loss.kd_sample if loss.kd_positions == "sample" else None
    return [loss.kd > 0, loss.task > 0, loss.kd_positions, share]
