"""What goes with which task: settings that would be idle, or mean nothing, for the one that was chosen."""

from typing import TYPE_CHECKING

from raydistil.types import IN_TORCH, labels_texts, models_language, takes_labels

if TYPE_CHECKING:
    from raydistil.config import Config

LEAST = 32  # tokens of a question with a part of its context


def check_task(config: "Config") -> None:
    """Raise ValueError for a setting of another task than the configuration's."""
    _check_data(config)
    _check_windows(config)
    if config.task == "embedding":
        _check_vectors(config)
    for train in config.trainings():
        if config.task == "regression":
            train.check_numbers()
        train.check_sparse()
        if config.task == "clm":
            train.loss.check_causal()
        if not models_language(config.task):
            train.loss.check_texts(config.task)
        if config.task == "question_answering":
            train.loss.check_places()


def _check_data(config: "Config") -> None:
    task = config.task
    whole = labels_texts(task) or task == "embedding"
    if not whole and config.distill is not None and config.distill.augment is not None:
        raise ValueError(
            f"distill.augment is of task classification, regression or embedding: leave it out for task {task}"
        )
    if not takes_labels(task) and config.corpus.labelled_share < 1:
        raise ValueError(f"corpus.labelled_share is of labelled texts: leave it out for task {task}")
    if config.corpus.pair_column is not None and not labels_texts(task):
        raise ValueError(f"corpus.pair_column is of task classification or regression: leave it out for task {task}")
    without = ("regression", "token_classification", "question_answering")
    if task in without and config.corpus.max_rows_per_label is not None:
        raise ValueError(f"corpus.max_rows_per_label is of texts' classes: use corpus.max_rows for task {task}")
    if task == "clm" and config.export is not None and set(config.export.to) - IN_TORCH:
        known, given = ", ".join(sorted(IN_TORCH)), ", ".join(config.export.to)
        raise ValueError(f"export.to: expected some of {known} for task clm, got {given}")
    if task != "mlm" and config.masking != type(config.masking)():
        raise ValueError(f"masking is of task mlm: leave [masking] out for task {task}")


def _check_windows(config: "Config") -> None:
    asked, length, stride = config.task == "question_answering", config.tokens.length, config.tokens.stride
    for key, value in {"tokens.stride": stride, "corpus.context_column": config.corpus.context_column}.items():
        if value is not None and not asked:
            raise ValueError(f"{key} is of task question_answering: leave it out for task {config.task}")
    if asked and length < LEAST:
        raise ValueError(
            f"tokens.length: expected at least {LEAST} for a question and its context, got {length}: raise it"
        )
    if stride is not None and stride > length // 4:
        raise ValueError(
            f"tokens.stride: expected at most a quarter of tokens.length = {length}, got {stride}: lower it"
        )


def _check_vectors(config: "Config") -> None:
    """They are learned from a teacher alone."""
    if config.finetune is not None:
        raise ValueError("finetune: a teacher of task embedding is used as it came: leave [finetune] out")
    if config.evaluate is not None and config.evaluate.no_teacher_baseline:
        raise ValueError("evaluate.no_teacher_baseline learns from labels: leave it out for task embedding")
    for train in config.trainings():
        train.check_vectors()
