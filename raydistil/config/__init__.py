"""The configuration: one TOML file, one section per stage; a stage runs if its section is there.

Values come from the file, then from `--set section.key=value`, else from the defaults below. An unknown key is an
error that names the nearest known one. `result_hash` covers what defines the result (data, models, losses, seed,
batch sizes) and leaves out what does not (placement, worker counts, serving).
"""

import copy
import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from raydistil.config.checkpoints import CheckpointsConfig
from raydistil.config.cluster import ClusterConfig
from raydistil.config.recipes import over_recipe
from raydistil.config.section import Positive, Section, Share
from raydistil.config.student import AssistantConfig, StudentConfig
from raydistil.config.targets import check_drawn, variants_of, what_is_drawn
from raydistil.config.tasks import check_task
from raydistil.config.teacher import EnsembleConfig, TeacherConfig, check_ensemble
from raydistil.config.train import DistillConfig, TrainConfig
from raydistil.errors import ConfigError
from raydistil.types import Format, Task, Vocabulary


class CorpusConfig(Section):
    source: str
    """`python-docs`, a file or glob (.jsonl .csv .parquet .txt), or the name of a hub data set."""
    validation_source: str | None = None
    """Files for the validation split; without it, a share of `source`, chosen by hash."""
    test_source: str | None = None
    """Files for the test split; without it, a share of `source`, chosen by hash."""
    validation_share: Share = 0.05
    test_share: Share = 0.15
    text_column: str | None = None
    """Column that holds the text, the list of words (task token_classification) or the question; None: guessed, and the
    guess is printed."""
    label_column: str | None = None
    """Column that holds the class or the number, the list of the words' classes, or the answers as SQuAD has them;
    None: guessed, and the guess is printed."""
    pair_column: str | None = None
    """Tasks classification and regression: column of a second text that goes with the first (GLUE's pairs); None: none,
    unless the columns have names by which pairs are known, and the guess is printed. Of `python-docs`: `rest`, what
    follows a docstring's summary."""
    context_column: str | None = None
    """Task question_answering: column of the text that holds the answer; None: guessed, and the guess is printed."""
    hub_config: str | None = None
    """Configuration of a hub data set, such as `20231101.en` of `wikimedia/wikipedia`."""
    labelled_share: Share = 1.0
    """Share of the training rows whose label is used, chosen by hash; the rest is text that only a teacher labels."""
    libraries: tuple[str, ...] = ()
    """`python-docs` only: top-level import names to read; empty: all that are installed, and the standard library."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Rows that cannot be read or used (bad bytes, no text, a damaged row group of Parquet): so many are left out,
    counted and named; one more is an error."""
    max_rows: Positive | None = None
    """Of each of `source`, `validation_source` and `test_source`; so is `max_rows_per_label` (no label is one too)."""
    max_rows_per_label: Positive | None = None
    max_rows_per_module: Positive | None = None
    """`python-docs` only: so that one long module does not stand for a whole library."""


class TokensConfig(Section):
    length: Annotated[int, Field(ge=8)] = 128
    """Tokens of a packed block, or the longest example kept whole (longer ones are cut, and counted)."""
    buckets: tuple[Annotated[int, Field(ge=8)], ...] = ()
    """Padded lengths for labelled examples, ascending; `length` is always the last."""
    stride: Positive | None = None
    """Task question_answering: tokens that the windows of a long context share; None: a quarter of `length`."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Texts with fewer tokens are left out, and counted."""
    max_unknown_share: Share = 1.0
    """Texts with a larger share of unknown tokens are left out, and counted."""


class MaskingConfig(Section):
    kind: Literal["uniform", "frequency"] = "uniform"
    """`uniform`: each token alike. `frequency`: p ~ count^-smoothing over a micro-batch (DistilBERT, XLM).

    Over each row apart where `distill.targets.mask_variants` is set."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    smoothing: Annotated[float, Field(ge=0)] = 0.7

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> "MaskingConfig":
        if self.kind == "uniform":
            self.refuse_idle({"smoothing": "kind = frequency"})
        return self


class EvaluateConfig(Section):
    batch_size: Positive = 32
    no_teacher_baseline: bool = False
    """Also train the same student (same start, batch size, number of steps) on the labels alone, and score it."""
    baseline_lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of that baseline, tuned as the student's was; None: the student's."""
    latency_length: Positive = 64
    """Tokens of the one-row request whose single-thread latency is measured."""
    latency_rounds: Positive = 60


class ExportConfig(Section):
    to: Annotated[tuple[Format, ...], Field(min_length=1)] = ("hf",)
    """`hf`: always there. `onnx`: for onnxruntime. `bf16` and `fp16`: halves of the two. `int8`: ONNX in 8 bits,
    `int8-static` with ranges found on training rows. `int8-torchao`, `fp8-torchao`: PyTorch in 8 bits, for GPUs. What
    is not as good, no smaller, or in 8 bits no faster, is refused."""
    vocabulary: Vocabulary = "teacher"
    """`corpus`: cut to the tokens of the training texts, and the characters that spell any other text."""
    license: str | None = None
    """Name for the model card: one that the hub knows (SPDX), or any other with its `license_link`."""
    license_link: str | None = None
    """Where the text of a license is that the hub does not know by name."""

    @model_validator(mode="after")
    def _license_has_a_name(self) -> "ExportConfig":
        if self.license_link and self.license is None:
            raise ValueError("license_link is of a license: set license to its name")
        if self.license == "other":
            raise ValueError("license other says nothing: set license to its name and license_link to its text")
        return self


class Config(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Directory of the run below `output_dir`; the same name goes on where it stopped."""
    output_dir: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    task: Task
    corpus: CorpusConfig
    tokens: TokensConfig = TokensConfig()
    masking: MaskingConfig = MaskingConfig()
    teacher: TeacherConfig
    ensemble: tuple[EnsembleConfig, ...] = ()
    """Teachers beside it: the student learns from the weighted mean of what they all say."""
    student: StudentConfig
    assistants: tuple[AssistantConfig, ...] = ()
    """Models between teacher and student, largest first: the teacher teaches the first, the last one the student."""
    finetune: TrainConfig | None = None
    """Teach the teacher the task before the distillation."""
    distill: DistillConfig | None = None
    evaluate: EvaluateConfig | None = None
    export: ExportConfig | None = None
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_dir(self) -> Path:
        return self.output_dir / self.name

    @model_validator(mode="after")
    def _buckets_end_at_length(self) -> "Config":
        if any(bucket >= self.tokens.length for bucket in self.tokens.buckets):
            raise ValueError(f"tokens.buckets must lie below tokens.length = {self.tokens.length}")
        return self

    @model_validator(mode="after")
    def _micro_batches_hold_a_row(self) -> "Config":
        for name, train in (("finetune", self.finetune), ("distill", self.distill)):
            budget = None if train is None else train.micro_batch_tokens
            if budget is not None and budget < self.tokens.length:
                raise ValueError(
                    f"{name}.micro_batch_tokens: expected at least tokens.length = {self.tokens.length}, got {budget}: "
                    f"raise it, or cut texts shorter"
                )
        return self

    @model_validator(mode="after")
    def _settings_are_of_the_task(self) -> "Config":
        check_task(self)
        return self

    @model_validator(mode="after")
    def _teachers_speak_as_one(self) -> "Config":
        if self.teacher.weight != 1 and not self.ensemble:
            raise ValueError("teacher.weight is its say beside those of [[ensemble]]: add one, or leave the weight out")
        if self.ensemble and self.student.vocabulary == "corpus":
            raise ValueError("student.vocabulary = corpus cuts down one teacher's: leave it or [[ensemble]] out")
        if self.ensemble and self.distill:
            check_ensemble(self.task, self.trainings()[0].loss, self.distill.targets)
        return self

    @model_validator(mode="after")
    def _cached_targets_are_those_of_every_epoch(self) -> "Config":
        if self.distill:
            check_drawn(self.distill.targets, self.drawn())
        return self

    @model_validator(mode="after")
    def _assistants_are_distilled(self) -> "Config":
        if self.assistants and self.distill is None:
            raise ValueError("assistants are distilled: add a section [distill], or leave [[assistants]] out")
        return self

    @model_validator(mode="after")
    def _what_is_scored_is_distilled(self) -> "Config":
        for name, section in (("evaluate", self.evaluate), ("export", self.export)):
            if section is not None and self.distill is None:
                raise ValueError(f"{name} is of the student: add a section [distill], or leave [{name}] out")
        return self

    def drawn(self) -> dict[str, tuple[int, str | None]]:
        """(epochs, what is random in a text and its targets) of trainings with a teacher, by the key of the epochs."""
        found: dict[str, tuple[int, str | None]] = {}
        names = [f"assistants.{n}.epochs" if one.epochs else "distill.epochs" for n, one in enumerate(self.assistants)]
        for name, train in zip([*names, "distill.epochs"], self.trainings(), strict=True):
            general = train.general_training()
            for key, part in (("distill.general.epochs", general), (name, train)):
                drawn = what_is_drawn(self.task, part.targets, part.loss, part.augment) if part.epochs else None
                found[key] = (part.epochs, drawn or found.get(key, (0, None))[1])
        return found

    def trainings(self) -> list[DistillConfig]:
        """Of every student of the chain, that of the last one last; none without [distill]."""
        if self.distill is None:
            return []
        return [*(self.distill.changed(one.epochs, one.lr, one.loss) for one in self.assistants), self.distill]


# What does not define the result, and so may differ between a run and its continuation.
PLACEMENT = ("name", "output_dir", "evaluate", "export", "checkpoints", "cluster")


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read `path`, apply `section.key=value` overrides in order, and validate.

    Raises ConfigError: no such file, not TOML, unknown key, wrong type or range.
    """
    return config_of(merged(read_toml(path), overrides))


def read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"expected a TOML file, found none at {path}: check the path (jobs/ holds examples)")
    try:
        return tomllib.loads(path.read_text(encoding="utf8"))
    except ValueError as error:  # not UTF-8, not TOML, or a number with thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def merged(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`tree` with every override written into a copy of it, as plain JSON values (dates become strings)."""
    result = copy.deepcopy(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set expects section.key=value, got {override!r}: write for example --set seed=1")
        _write(result, key.strip().split("."), _value(text.strip()), override)
    plain: dict[str, Any] = json.loads(json.dumps(result, default=str))
    return plain


def _write(tree: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
    tree[path[-1]] = value


def _value(text: str) -> Any:
    """The TOML value `text` stands for; anything else, such as a bare word, is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def config_of(tree: dict[str, Any]) -> Config:
    """A configuration from plain JSON values. Raises ConfigError: unknown key, wrong type or range.

    Strictly: `true` is no number and `"3"` no integer. JSON mode lets a list stand for a tuple.
    """
    try:
        return Config.model_validate_json(json.dumps(over_recipe(tree)), strict=True)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo explains what is missing
        more = "" if error.error_count() == 1 else f" (and {error.error_count() - 1} more)"
        raise ConfigError(_explain(first) + more) from error


def _explain(error: ErrorDetails) -> str:
    """One line for one pydantic error."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {path}{_nearest(path)}"
    if error["type"] == "missing":
        return f"{path} is missing: {_how_to_set(path)}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{path}: {message}, got {_short(error['input'])}" if path else message


def _how_to_set(path: str) -> str:
    is_section = any(key.startswith(f"{path}.") for key in all_keys(Config))
    return f"add a section [{path}] to the file" if is_section else f"set it in the file or with --set {path}=..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(path: str) -> str:
    """`: did you mean X?` for the key of the same section most like `path`, else for one of that name elsewhere.

    Without either, the keys of the section.
    """
    section, _, name = ".".join(part for part in path.split(".") if not part.isdigit()).rpartition(".")
    known = sorted(all_keys(Config))
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    namesakes = [key for key in known if key.rpartition(".")[2] == name]
    similar = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    elsewhere = difflib.get_close_matches(path, namesakes, n=1, cutoff=0)
    for key in similar + elsewhere:
        return f": did you mean {key}?"
    return f": {section or 'the top level'} has {', '.join(siblings)}"


def all_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of every key below `model`, sections included; of a list of sections, those of each of them."""
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(prefix + name)
        section = _section_of(field.annotation)
        if section is not None:
            keys |= all_keys(section, f"{prefix}{name}.")
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value for a nested dictionary."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def result_part(config: Config) -> dict[str, Any]:
    """The part of the configuration that defines the result, as plain JSON values."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    if (
        distill := config.distill
    ) is not None:  # where targets are kept defines nothing, how often masks are drawn does
        del tree["distill"]["targets"]["cache"]
        drawn = any(what for _, what in config.drawn().values())
        tree["distill"]["targets"]["mask_variants"] = variants_of(distill.targets) if drawn else None
    return {key: value for key, value in tree.items() if key not in PLACEMENT}


def result_hash(config: Config) -> str:
    """16 hex digits over `result_part`."""
    return digest(result_part(config))


def digest(value: Any) -> str:
    """16 hex digits over any JSON value; equal values give equal digits."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def explain(config: Config, tree: dict[str, Any], overrides: list[str]) -> list[tuple[str, Any, str]]:
    """(key, value, origin) for every resolved value; origin is `--set`, `file`, `recipe` or `default`."""
    origins = dict.fromkeys(flatten(over_recipe(merged(tree, overrides))), "recipe")
    origins |= dict.fromkeys(flatten(tree), "file") | dict.fromkeys(flatten(merged({}, overrides)), "--set")
    values = flatten(config.model_dump(mode="json", exclude_none=True))
    return [(key, value, origins.get(key, "default")) for key, value in values.items()]
