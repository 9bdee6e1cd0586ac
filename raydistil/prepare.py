"""prepare: everything that can be wrong with the input shows here, before any Ray process starts."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistil import rundir
from raydistil.chain import assistants, teacher_models
from raydistil.cluster import check_before_start
from raydistil.compared import check_losses
from raydistil.config import Config
from raydistil.corpus import Corpus, open_corpus
from raydistil.errors import ConfigError, DataError, ModelError, StorageError
from raydistil.models import load_tokenizer, outline, quiet_transformers, resolve, shape_of
from raydistil.plan import Need, need_of
from raydistil.prune import pruned_teacher
from raydistil.storage import cache_dir
from raydistil.student import check_student, check_vocabularies, student_outline
from raydistil.tokens import TokenStore, build_store
from raydistil.types import CONTENT, IN_TORCH, TORCHAO, Content, Task, has_classes, models_language, takes_labels

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every stage needs: the configuration, its directory and the token store."""

    config: Config
    run_dir: Path
    store: TokenStore
    say: Say

    @property
    def labels(self) -> tuple[str, ...]:
        return self.store.meta.labels

    @property
    def teacher_dirs(self) -> tuple[str, ...]:
        """Where the teachers of the distillation are: fine-tuned here, or as they came."""
        models = teacher_models(self.config)
        if self.config.finetune:
            return tuple(str(self.run_dir / rundir.numbered(rundir.TEACHER, n)) for n in range(len(models)))
        return tuple(resolve(model) for model in models)


def prepare(config: Config, say: Say) -> Prepared:
    """Check the models and the plan, make the token store, claim the directory; `say` what the user should know."""
    quiet_transformers()
    check_packages(config)
    check_models(config)
    check_before_start(config.cluster, needs(config))
    store, used = TokenStore(make_store(config)), config
    check_store(config, store)
    heads = list(describe_heads(config, num_outputs(config.task, store.meta.labels)))
    if config.student.vocabulary == "corpus":
        used = _in_words_of(config, store, say)
        store = TokenStore(make_store(used))
    for line in (*describe_store(store), *heads):
        say(line)
    return Prepared(used, rundir.claim(config, store.path.name), store, say)


def reopened(config: Config, say: Say) -> Prepared:
    """A run that is there, with the token store it was made from, whatever has become of its corpus: of `python-docs`
    every package that is installed is a part. Where that store is not in the cache, or the student has words of its
    own, it is prepared anew.
    """
    path = _store_of(config)
    if path is None or config.student.vocabulary == "corpus":
        return prepare(config, say)
    quiet_transformers()
    return Prepared(config, rundir.claim(config, path.name), TokenStore(path), say)


def looked_at(config: Config, say: Say) -> Prepared:
    """A run that is there, to read from: others may be at work in it. Raises StorageError without its token store."""
    path = _store_of(config)
    if path is None:
        raise StorageError(
            f"expected the token store that {config.run_dir} was made from in {cache_dir()}, found none: run "
            f"raydistil evaluate with its configuration, which makes it again"
        )
    quiet_transformers()
    return Prepared(config, config.run_dir, TokenStore(path), say)


def _store_of(config: Config) -> Path | None:
    kept = rundir.data_of(config.run_dir)
    path = cache_dir() / "tokens" / kept if kept else None
    return path if path is not None and path.is_dir() else None


def _in_words_of(config: Config, store: TokenStore, say: Say) -> Config:
    """`config` with the teacher that has the vocabulary of `store` alone."""
    path = str(pruned_teacher(config, store))
    before, after = len(load_tokenizer(config.teacher.model)), len(load_tokenizer(path))
    say(f"vocabulary: {after:,} of {before:,} tokens, those of the training texts and what they are spelt with")
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"model": path})})


def needs(config: Config) -> list[Need]:
    """What the training stages of `config` ask of the cluster, one after the other."""
    wanted = [need_of(config.cluster, pools=0)] if config.finetune else []
    if config.distill and config.distill.targets.cache:
        return [*wanted, need_of(config.cluster, pools=1, with_student=False), need_of(config.cluster, pools=0)]
    return wanted + ([need_of(config.cluster, pools=1 + len(config.ensemble))] if config.distill else [])


def check_packages(config: Config) -> None:
    """Raise ConfigError where `export.to` names what would be missed when all is trained."""
    asked = set(config.export.to) if config.export else set()
    for extra, wanted, packages in (
        ("onnx", asked - IN_TORCH, ("onnx", "onnxscript", "onnxruntime")),
        ("torchao", asked & TORCHAO, ("torchao",)),
    ):
        missing = [name for name in packages if wanted and find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"export.to: expected the package {missing[0]} for {', '.join(sorted(wanted))}, found none: "
                f"pip install 'raydistil[{extra}]'"
            )


# ---- models


def check_models(config: Config) -> None:
    """Raise ModelError for a teacher that cannot be loaded or a student that cannot be made from it."""
    for whose, model in _named(config):
        shape = shape_of(model, f"{whose}.model")
        _check_decoder(config, whose, shape)
        _check_head(config, whose, shape)
        _check_positions(config, whose, shape)
        check_vocabularies(config.teacher.model, model, whose)
        _check_rows(config, whose, shape)
    shape = shape_of(config.teacher.model, "teacher.model")
    tokenizer = load_tokenizer(config.teacher.model)
    _check_tokenizer(config, shape, tokenizer)
    *chain, student = outlines(config)
    for train, (taught_by, taught) in zip(config.trainings(), pairwise((*chain, student)), strict=False):
        check_losses(config.task, train.loss, taught_by.config, taught.config)
    if config.student.model is not None:
        check_vocabularies(config.teacher.model, config.student.model, "student")
        _check_decoder(config, "student", student.config)
        _check_positions(config, "student", student.config)


def outlines(config: Config, num_labels: int | None = None) -> list[PreTrainedModel]:
    """The shapes of teacher, assistants and student, without weights. Raises ModelError for one that cannot be made."""
    made = [outline(config.teacher.model, config.task, num_labels)]
    between = [student for student, _, _ in assistants(config)] if config.distill else []
    for student in (*between, config.student):
        check_student(student, made[-1].config)
        made.append(student_outline(made[-1], student, config.task, num_labels))
    return made


HEADS: dict[Task, tuple[str, ...]] = {
    "mlm": ("ForMaskedLM", "ForPreTraining"), "clm": ("ForCausalLM", "LMHeadModel"),
    "classification": ("ForSequenceClassification",), "regression": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",), "question_answering": ("ForQuestionAnswering",),
    "embedding": (),  # any encoder's states make a vector
}  # fmt: skip
UNPLACED: dict[Content, str] = {"tags": "words without a token", "answers": "answers longer than windows share"}
LABELLED = ("classes", "numbers", "tags", "answers")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # they take positions and masks of documents as they come


def _named(config: Config) -> Iterator[tuple[str, str]]:
    """(its section, the model) of every teacher."""
    sections = ["teacher", *(f"ensemble.{number}" for number in range(len(config.ensemble)))]
    return zip(sections, teacher_models(config), strict=True)


def _check_head(config: Config, whose: str, shape: Any) -> None:
    """A teacher that is used as it came must have a head: a random one would teach nothing, and differ each time."""
    kinds = tuple(shape.architectures or ())
    heads = HEADS[config.task]
    if heads and not config.finetune and not any(kind.endswith(heads) for kind in kinds):
        raise ModelError(
            f"{whose}.model: expected a teacher with a head for task {config.task}, got {', '.join(kinds) or 'none'}: "
            f"add [finetune] to give it one"
        )
    if config.task == "regression" and not config.finetune and shape.num_labels != 1:
        raise ModelError(
            f"{whose}.model: expected a teacher that gives one number for task regression, got one of "
            f"{shape.num_labels} classes: add [finetune] to an encoder without a head"
        )


def _check_rows(config: Config, whose: str, shape: Any) -> None:
    """Teachers whose distributions are mixed must have them over the same entries."""
    rows = shape_of(config.teacher.model, "teacher.model").vocab_size
    if models_language(config.task) and shape.vocab_size != rows:
        raise ModelError(
            f"{whose}.model: expected a vocabulary of {rows} entries, as teacher.model has, got {shape.vocab_size}: "
            f"use teachers padded to one size"
        )


def _check_decoder(config: Config, whose: str, shape: Any) -> None:
    """A causal model must keep the documents of a block apart, in each of its layers."""
    if config.task != "clm":
        return
    if shape.model_type not in DECODERS:
        raise ModelError(
            f"{whose}.model: expected one of {', '.join(DECODERS)} for task clm, got {shape.model_type}: choose "
            f"another, or task mlm for an encoder"
        )
    window = getattr(shape, "sliding_window", None)
    if window is not None and window < config.tokens.length:
        raise ConfigError(
            f"tokens.length: expected at most the {whose}'s attention window of {window} for task clm, got "
            f"{config.tokens.length}: lower it"
        )


def _check_tokenizer(config: Config, shape: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > shape.vocab_size:
        raise ModelError(
            f"teacher.model: expected a tokenizer with at most the model's {shape.vocab_size} tokens, got "
            f"{len(tokenizer)}: use the tokenizer the model was trained with"
        )
    if config.task == "mlm" and tokenizer.mask_token_id is None:
        raise ModelError("teacher.model: expected a tokenizer with a mask token for task mlm, this one has none")
    if config.task == "clm" and tokenizer.eos_token_id is None:
        raise ModelError("teacher.model: expected a tokenizer with an eos token for task clm, this one has none")
    augment = config.distill.augment if config.distill else None
    if augment is not None and augment.mask and tokenizer.mask_token_id is None:
        raise ModelError("distill.augment.mask: expected a tokenizer with a mask token, this one has none: set it to 0")


def _check_positions(config: Config, whose: str, shape: Any) -> None:
    positions = num_positions(shape)
    if positions is None:
        return
    wanted = {"tokens.length": config.tokens.length}
    if config.evaluate:
        wanted["evaluate.latency_length"] = config.evaluate.latency_length
    for key, length in wanted.items():
        if length > positions:
            raise ConfigError(f"{key}: expected at most the {whose}'s {positions} positions, got {length}: lower it")


def num_positions(shape: Any) -> int | None:
    """Tokens a model can take; None: any number. RoBERTa and its kin count positions from their padding id + 1."""
    most = getattr(shape, "max_position_embeddings", -1)  # XLNet has -1, T5 none: their positions are relative
    if most is None or most < 0:
        return None
    reserved = shape.pad_token_id + 1 if shape.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return int(most - reserved)


# ---- data


def make_store(config: Config) -> Path:
    tokenizer = load_tokenizer(config.teacher.model)
    return build_store(corpus_of(config), tokenizer, config.tokens, CONTENT[config.task], classes_of_teacher(config))


def corpus_of(config: Config) -> Corpus:
    """A teacher that is used as it came can label texts that have no label at all."""
    return open_corpus(config.corpus, CONTENT[config.task], needed=config.finetune is not None)


def classes_of_teacher(config: Config) -> tuple[str, ...]:
    """Of one that is used as it came, in the order of its ids; none where it is taught the data's."""
    if not has_classes(config.task) or config.finetune:
        return ()
    names: dict[int, str] = shape_of(config.teacher.model, "teacher.model").id2label
    return tuple(names[number] for number in sorted(names))


def describe_store(store: TokenStore) -> list[str]:
    """What the user should know of the data: guesses, counts, what was cut or left out."""
    meta = store.meta
    lines = list(meta.notes)
    if meta.labels:
        lines.append(f"classes: {', '.join(meta.labels)}")
        unseen = [label for label in meta.labels if label not in meta.splits["train"].classes]
        lines += [f"classes without a labelled training row: {', '.join(unseen)}"] if unseen else []
    train = meta.splits["train"].numbers
    if train is not None:
        lines.append(f"numbers: {train[0]:g} to {train[1]:g} in the training split")
    for split, counts in meta.splits.items():
        left_out = [
            f"{number:,} {what}"
            for number, what in (
                (counts.truncated, "cut"), (counts.too_short, "too short"), (counts.too_unknown, "too unknown"),
                (counts.unplaced, UNPLACED.get(meta.content, "")),
            ) if number
        ]  # fmt: skip
        waste = counts.padding / max(1, counts.padding + counts.tokens)
        if meta.content in LABELLED and counts.labelled_rows < counts.rows:
            left_out.insert(0, f"{counts.rows - counts.labelled_rows:,} of them without a label")
        notes = "".join(f", {note}" for note in left_out)
        lines.append(f"{split}: {counts.rows:,} rows, {counts.tokens:,} tokens, {waste:.1%} padding{notes}")
    return lines


def num_outputs(task: Task, labels: Collection[str]) -> int:
    """Of a head: one for each class, two for a span, else one."""
    return len(labels) if has_classes(task) else 2 if task == "question_answering" else 1


def describe_heads(config: Config, wanted: int) -> Iterator[str]:
    """Heads with another number of outputs than the data's classes, or than one number: they do not outlive loading."""
    if models_language(config.task) or config.task == "embedding":
        return
    given = [(f"{whose}.model", model) for whose, model in _named(config) if config.finetune]
    given += [("student.model", config.student.model)] if config.student.model else []
    for key, model in given:
        shape = shape_of(model, key)
        headed = any(kind.endswith(HEADS[config.task]) for kind in shape.architectures or ())
        if headed and shape.num_labels != wanted:
            yield f"{key}: its head has {shape.num_labels} outputs, the data {wanted}: a new one is made"


def check_store(config: Config, store: TokenStore) -> None:
    """Raise where the data cannot be scored, or speaks of other classes than a teacher that is used as it came."""
    labelled = takes_labels(config.task)
    if config.evaluate and not sum(store.bucket_rows("test", labelled)):
        raise DataError(
            f"expected {'labelled ' * labelled}rows in the test split to evaluate on, found "
            f"{store.meta.splits['test'].rows:,} rows{' and no label' * labelled}: raise corpus.test_share, or name "
            f"files with corpus.test_source"
        )
    if config.task == "regression":
        _check_numbers(config, store)
        return
    if config.task == "question_answering":
        _check_labelled(config, store)
        return
    classes = store.meta.splits["train"].classes
    if labelled and _trains_on_labels(config) and len(classes) < 2:
        raise DataError(
            f"expected labelled training rows of at least two classes, found {', '.join(classes) or 'none'}: raise "
            f"corpus.labelled_share, or leave [finetune] and evaluate.no_teacher_baseline out"
        )
    if labelled and not config.finetune:
        for whose, model in _named(config):
            _check_classes(whose, shape_of(model, f"{whose}.model"), store.meta.labels)


def _check_numbers(config: Config, store: TokenStore) -> None:
    """Numbers that are all the same rank nothing, and none teach nothing."""
    test = store.meta.splits["test"].numbers
    if config.evaluate and test is not None and test[0] == test[1]:
        raise DataError(
            f"expected different labels in the test split to rank predictions by, all are {test[0]:g}: raise "
            f"corpus.test_share, or name files with corpus.test_source"
        )
    _check_labelled(config, store)


def _check_labelled(config: Config, store: TokenStore) -> None:
    if _trains_on_labels(config) and not store.meta.splits["train"].labelled_rows:
        raise DataError(
            "expected labelled training rows, found none: raise corpus.labelled_share, or leave [finetune] and "
            "evaluate.no_teacher_baseline out"
        )


def _trains_on_labels(config: Config) -> bool:
    return config.finetune is not None or (config.evaluate is not None and config.evaluate.no_teacher_baseline)


def _check_classes(whose: str, teacher: Any, labels: tuple[str, ...]) -> None:
    """A teacher's class n must be the data's class n; `LABEL_n`, what an unnamed class is called, is taken as it is."""
    names = tuple(teacher.id2label[number] for number in range(teacher.num_labels))
    unnamed = tuple(f"LABEL_{number}" for number in range(len(labels)))
    if names not in (labels, unnamed):
        raise ModelError(
            f"{whose}.model: expected a teacher of the classes {', '.join(labels)}, in this order, got "
            f"{', '.join(names)}: add [finetune] to teach it these, or rename the labels"
        )
