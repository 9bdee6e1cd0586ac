"""The finished student with the vocabulary of its corpus; teacher and training are as they were.

It keeps every character, too, unlike one that was trained so: what is deployed meets texts that nobody has seen.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydistil.errors import ExportError
from raydistil.evaluate import evaluate
from raydistil.models import load_model, load_tokenizer
from raydistil.prepare import Prepared, make_store
from raydistil.specs import Candidate, EvaluateSpec, ModelReport
from raydistil.storage import mebibytes
from raydistil.student.vocabulary import prune_vocabulary
from raydistil.tokens import TokenStore
from raydistil.types import Score, Split


@dataclass(frozen=True, slots=True)
class Cut:
    """What a smaller vocabulary saves and costs; pairs of before and after."""

    tokens: tuple[int, int]
    bytes: tuple[int, int]  # of the weights
    split: Split  # that was scored
    scores: tuple[Score, Score]


def cut_vocabulary(run: Prepared, folder: Path) -> Prepared:
    """Cut that of the student in `folder`. Returns the run in its words: the same texts, cut by its tokenizer.

    Raises ModelError for a tokenizer that cannot be cut.
    """
    model, tokenizer = load_model(str(folder), run.config.task, run.labels), load_tokenizer(str(folder))
    pruned = prune_vocabulary(model, tokenizer, run.store.token_counts(), whole_alphabet=True)
    pruned.model.save_pretrained(folder)
    pruned.tokenizer.save_pretrained(folder)
    teacher = run.config.teacher.model_copy(update={"model": str(folder)})
    config = run.config.model_copy(update={"teacher": teacher})
    return replace(run, config=config, store=TokenStore(make_store(config)))


def weighed(folder: Path, spec: EvaluateSpec) -> ModelReport:
    """Size and score of the student in `folder`, as it is exported."""
    (found,) = evaluate(spec, [Candidate("exported", (str(folder),), (1.0,), timed=False)])
    return found


def check_cut(cut: Cut, most_lost: float) -> None:
    """Raise ExportError where it loses too much."""
    before, after = cut.scores
    lost = before.value - after.value
    if lost > most_lost:
        raise ExportError(
            f"vocabulary: expected at most {most_lost} of the {before.metric} lost on {before.rows:,} {cut.split} "
            f"items, got {lost:.4f} ({before.value:.4f} to {after.value:.4f}): keep the teacher's, or take it as it "
            f"is with --force"
        )


def cut_line(cut: dict[str, Any]) -> str:
    """`cut`: a Cut as JSON."""
    (before, after), (large, small), (whole, left) = cut["tokens"], map(mebibytes, cut["bytes"]), cut["scores"]
    return (
        f"{after:,} of {before:,} tokens, {large} to {small} of weights, {whole['metric']} "
        f"{whole['value']:.4f} to {left['value']:.4f} on {whole['rows']:,} {cut['split']} items"
    )
