"""Which texts are the teacher's: what the student is least sure of, as little as gives an accuracy on validation rows.

N rows, C classes. Confidence is the share that the student gives its best class after its logits were divided by a
temperature, found on the same rows (Guo et al. 2017, arXiv:1706.04599).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from raydistil.errors import PlanError
from raydistil.evaluate import class_logits
from raydistil.export import held_out, run_config
from raydistil.models import HeadedEncoder, load_model
from raydistil.prepare import looked_at
from raydistil.serve.offer import teacher_of
from raydistil.serve.served import Cascade, Wishes
from raydistil.serve.source import directory_of, labels_of
from raydistil.specs import EvaluateSpec
from raydistil.tokens import TokenStore

TEMPERATURES = 0.05, 20.0

Floats = NDArray[np.float32]


def with_cascade(wishes: Wishes, accuracy: float, say: Callable[[str], None]) -> Wishes:
    """With the teacher's place, and the cascade of that accuracy. Raises PlanError as `cascade_of` does."""
    run_dir = Path(wishes.run_dir)
    teacher = teacher_of(run_dir) if wishes.teacher is None else Path(wishes.teacher)
    return replace(wishes, teacher=str(teacher), cascade=cascade_of(run_dir, teacher, accuracy, say))


def cascade_of(run_dir: Path, teacher: Path, accuracy: float, say: Callable[[str], None]) -> Cascade:
    """With at least that accuracy on the run's validation rows, or its test rows where there are none.

    Raises PlanError for a run that does not classify, and where no cascade of the two is as accurate.
    """
    config = run_config(run_dir)
    if config.task != "classification":
        raise PlanError(f"expected a student of classification for a cascade, {run_dir} is of {config.task}")
    spec = held_out(looked_at(config, say))
    paths = directory_of(run_dir), teacher
    truth_N, student_NC, teacher_NC = _said(paths, spec)
    cascade = chosen(truth_N, student_NC, teacher_NC, accuracy)
    alone = [(logits.argmax(-1) == truth_N).mean() for logits in (student_NC, teacher_NC)]
    say(
        f"cascade: below a confidence of {cascade.threshold:.3f} the teacher answers: {cascade.share:.1%} of "
        f"{len(truth_N):,} {spec.split} rows, accuracy {cascade.accuracy:.4f} (student {alone[0]:.4f}, teacher "
        f"{alone[1]:.4f})"
    )
    if spec.split != "test" and any(TokenStore(spec.store).bucket_rows("test", labelled=True)):
        say(_checked(cascade, *_said(paths, replace(spec, split="test"))))
    return cascade


def chosen(truth_N: NDArray[np.int64], student_NC: Floats, teacher_NC: Floats, accuracy: float) -> Cascade:
    """The cascade that asks the teacher least. Raises PlanError where none is as accurate."""
    temperature = calibrated(truth_N, student_NC)
    sure_N = confidences(student_NC, temperature)
    order_N = sure_N.argsort(kind="stable")
    own_N, theirs_N = ((logits.argmax(-1) == truth_N)[order_N] for logits in (student_NC, teacher_NC))
    # [N + 1] right answers where the first so many, by rising confidence, are the teacher's.
    right = np.concatenate([[0], theirs_N.cumsum()]) + own_N.sum() - np.concatenate([[0], own_N.cumsum()])
    bounds = np.concatenate([[0.0], sure_N[order_N][1:], [np.inf]])  # the threshold of each
    apart = np.concatenate([[True], np.diff(sure_N[order_N]) > 0, [True]])  # equal ones are on one side
    shares = np.where(apart, right / len(truth_N), -1.0)
    reached = np.flatnonzero(shares >= accuracy)
    if len(reached) == 0:
        best = int(shares.argmax())
        raise PlanError(
            f"expected an accuracy that student and teacher reach together on {len(truth_N):,} rows, got {accuracy:g}: "
            f"the most is {shares[best]:.4f}, with {best / len(truth_N):.1%} of the texts for the teacher"
        )
    first = int(reached[0])
    threshold = float(min(bounds[first], 2.0))  # no confidence is as high: all are the teacher's
    return Cascade(threshold, temperature, first / len(truth_N), float(shares[first]), accuracy)


def calibrated(truth_N: NDArray[np.int64], logits_NC: Floats) -> float:
    """The temperature with the least cross-entropy, within TEMPERATURES: which is convex in its inverse, so a third of
    what is left can be left out each time."""
    rows = np.arange(len(truth_N))

    def loss(inverse: float) -> float:
        return float(-_log_shares(logits_NC, 1 / inverse)[rows, truth_N].mean())

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    while high / low > 1.001:
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if loss(first) < loss(second) else (first, high)
    return 2 / (low + high)


def confidences(logits_NC: Floats, temperature: float) -> Floats:
    """[N]"""
    sure: Floats = np.exp(_log_shares(logits_NC, temperature).max(-1))
    return sure


def _log_shares(logits_NC: Floats, temperature: float) -> Floats:
    above_NC = (logits_NC - logits_NC.max(-1, keepdims=True)) / temperature
    shares: Floats = above_NC - np.log(np.exp(above_NC).sum(-1, keepdims=True))
    return shares


def _checked(cascade: Cascade, truth_N: NDArray[np.int64], student_NC: Floats, teacher_NC: Floats) -> str:
    """On rows that had no say in it."""
    theirs_N = confidences(student_NC, cascade.temperature) < cascade.threshold
    right_N = np.where(theirs_N, teacher_NC.argmax(-1), student_NC.argmax(-1)) == truth_N
    return f"cascade: on {len(truth_N):,} test rows {theirs_N.mean():.1%}, accuracy {right_N.mean():.4f}"


def _said(paths: tuple[Path, Path], spec: EvaluateSpec) -> tuple[NDArray[np.int64], Floats, Floats]:
    """(true classes, the student's logits, the teacher's)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(spec.threads)
    said = []
    for path in paths:
        columns = in_order(labels_of(path), spec.labels)
        model = HeadedEncoder(load_model(str(path), spec.task, spec.labels), spec.task, spec.precision)
        truth_N, logits_NC = class_logits([(model.frozen().to(device), 1.0)], spec, device)
        said.append(logits_NC[:, columns])
    student_NC, teacher_NC = said
    return truth_N, student_NC, teacher_NC


def in_order(own: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Where each of `labels` stands among a model's own. Raises PlanError where these are others."""
    if sorted(own) != sorted(labels):
        raise PlanError(f"expected a model of the labels {sorted(labels)} for a cascade, got {sorted(own)}")
    return [own.index(label) for label in labels]
