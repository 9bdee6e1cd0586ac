"""The model in a run's directory, or in a directory of its own: is it whole, and what does it do?"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raydistil import rundir
from raydistil.errors import StorageError
from raydistil.serve.schema import Source
from raydistil.types import SENTENCE_LAYOUT, Task

TOKENIZER, SETTINGS, WEIGHTS = "tokenizer.json", "tokenizer_config.json", "model.safetensors"
SAYING = ("config.json", TOKENIZER, WEIGHTS)  # what makes a model say what it says
REPORT = "raydistil.json"
HEADS: dict[str, Task] = {
    "ForSequenceClassification": "classification", "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering", "ForMaskedLM": "mlm",
}  # fmt: skip
CAUSAL = ("ForCausalLM", "LMHeadModel")


def find(run_dir: Path) -> Source:
    """The model of a run's directory, or in a directory of its own. Raises StorageError: none, incomplete, no task."""
    student, directory = run_dir / rundir.STUDENT, directory_of(run_dir)
    if not run_dir.is_dir():
        raise StorageError(f"expected the directory of a run or a model, found none at {run_dir}: check the path")
    if directory == run_dir and "hash" in _json(run_dir, rundir.CONFIG):
        raise StorageError(f"expected an exported student at {student}, found none: run raydistil export first")
    config = _json(directory, "config.json")
    _json(directory, TOKENIZER)
    _check_weights(directory)
    report = _json(directory, REPORT) if (directory / REPORT).exists() else None
    task = _task(directory, config)
    mask_token = _mask_token(directory) if task == "mlm" else None
    return Source(
        run_dir.resolve().name, str(directory.resolve()), task, mask_token, report or None, version_of(directory)
    )  # fmt: skip


def version_of(directory: Path) -> str:
    """SHA-256 over those of its configuration, tokenizer and weights."""
    whole = hashlib.sha256()
    for name in SAYING:
        with (directory / name).open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def labels_of(directory: Path) -> list[str]:
    """In the order of the model's outputs. Raises StorageError as `find` does."""
    named: dict[str, str] = _json(directory, "config.json").get("id2label", {})
    return [named[number] for number in sorted(named, key=int)]


def width_of(directory: Path) -> int | None:
    """Of its hidden states, and of the vectors that are made of them. Raises StorageError as `find` does."""
    config = _json(directory, "config.json")
    found: int | None = config.get("hidden_size", config.get("dim"))  # DistilBERT's name for it
    return found


def directory_of(run_dir: Path) -> Path:
    student = run_dir / rundir.STUDENT
    return student if student.is_dir() else run_dir


def _json(directory: Path, name: str) -> dict[str, Any]:
    """Raises StorageError where the file is missing or broken."""
    path = directory / name
    try:
        value: Any = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise _incomplete(directory, name, "is not there") from error
    except ValueError as error:
        raise _incomplete(directory, name, f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _incomplete(directory, name, "is not a JSON object")
    return value


def _check_weights(directory: Path) -> None:
    """Raises StorageError where the file is missing or shorter than its header says."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise _incomplete(directory, WEIGHTS, "is not there")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _incomplete(directory, WEIGHTS, f"is broken ({error})") from error


def _incomplete(directory: Path, name: str, what: str) -> StorageError:
    return StorageError(
        f"expected a whole model in {directory} (config.json, {WEIGHTS}, {TOKENIZER}), but {name} {what}: "
        f"run raydistil export again, or check the path"
    )


def _task(directory: Path, config: dict[str, Any]) -> Task:
    """By the model's head. Raises StorageError for one that no route answers for."""
    names = config.get("architectures") or []
    if any(name.endswith(CAUSAL) for name in names):
        raise StorageError(
            f"expected a model {' or '.join(HEADS)} in {directory}, got the causal language model {names[0]}: there is "
            f"no route for those, load it with transformers' AutoModelForCausalLM"
        )
    if "pooling" in config or (directory / SENTENCE_LAYOUT).exists():
        return "embedding"
    tasks = [task for name in names for head, task in HEADS.items() if name.endswith(head)]
    if not tasks:
        raise StorageError(
            f"expected a model {' or '.join(HEADS)} in {directory}, its architecture is "
            f"{', '.join(names) or 'not given'}: serve the exported student of a run"
        )
    if tasks[0] == "classification" and len(config.get("id2label") or "??") == 1:
        return "regression"
    _check_scores(directory, config)
    return tasks[0]


def _check_scores(directory: Path, config: dict[str, Any]) -> None:
    """Raises StorageError where a head's numbers are no scores of labels, one of which is chosen."""
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise StorageError(
            f"expected a model that chooses one label in {directory}, its problem_type is {config['problem_type']}: "
            f"its scores would mean something else"
        )


def _mask_token(directory: Path) -> str | None:
    """As the tokenizer's settings have it; some leave it to the tokenizer's class."""
    settings = _json(directory, SETTINGS) if (directory / SETTINGS).exists() else {}
    token = settings.get("mask_token")
    return token["content"] if isinstance(token, dict) else token
