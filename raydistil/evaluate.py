"""evaluate: checkpoints -> one table, with every score beside the teacher's.

Classification: accuracy with its Wilson interval, and macro F1. Regression: Spearman's rank correlation with its
bootstrap interval, Pearson's, and the root of the mean squared error. Token classification: F1 of entities, or accuracy
where classes do not mark them. Question answering: SQuAD's F1 and exact match. Embedding: how many texts' first halves
are nearest to their own second half (as in the inverse cloze task, Lee et al. 2019, arXiv:1906.00300), which takes no
labels. Masked-LM: the share of masked tokens found and
the mean cross-entropy at them, on masks that depend on nothing but the text's place, so every model meets the same
ones. Causal LM: the share of next tokens found, the mean cross-entropy of each given those of its document before it in
the block, and its exponential, the perplexity.
Several teachers count as one, by the weighted mean of what they hold probable, or of their numbers; their times add up.
Latency: median over interleaved rounds, one row, one thread, float32.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from raydistil.ensemble import mean_logits, mixed_logits
from raydistil.errors import DataError
from raydistil.heads import Inputs
from raydistil.manifest import Manifest, Slot
from raydistil.models import Headed, HeadedEncoder, load_model, num_parameters, on_device
from raydistil.scores import Floats, correlation, spearman, wilson
from raydistil.scores.answers import Found, answer_scores
from raydistil.scores.entities import entity_f1, marks_entities
from raydistil.size import describe_model
from raydistil.source import MicroBatches
from raydistil.specs import Candidate, EvaluateSpec, ModelReport, SourceSpec
from raydistil.targets import PLACES_AT_ONCE
from raydistil.tokens import TokenStore
from raydistil.types import IGNORE, Score, TokenBatch, takes_labels

Voices = list[tuple[Headed, float]]  # models and their weights
MOST_HALVES, LEAST_TOKENS = 1000, 8  # texts that are told apart, and what each half of one has at least
MASK_SEED = 20_191_008  # fixed: a score must not change with the seed of the training


def evaluate(spec: EvaluateSpec, candidates: list[Candidate]) -> list[ModelReport]:
    """Score every candidate on `spec.split`, then time those that are to be timed."""
    torch.set_num_threads(spec.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scored = [_scored(spec, candidate, device) for candidate in candidates]
    timed = [candidate for candidate in candidates if candidate.timed]
    latency = dict(zip([c.name for c in timed], latencies_ms(spec, timed), strict=True))
    return [replace(row, latency_p50_ms=latency.get(row.name)) for row in scored]


def _scored(spec: EvaluateSpec, candidate: Candidate, device: torch.device) -> ModelReport:
    loaded = [load_model(model, spec.task, spec.labels) for model in candidate.models]
    parameters = sum(map(num_parameters, loaded))
    models = [HeadedEncoder(model, spec.task, spec.precision).frozen().to(device) for model in loaded]
    size = sum(map(_size_on_disk, candidate.models)) or 4 * parameters
    flops = sum(describe_model(model, spec.config.latency_length).flops_per_token for model in loaded)
    score, figures = judged(list(zip(models, candidate.weights, strict=True)), spec, device)
    return ModelReport(candidate.name, parameters, size, flops, score, **figures)


def judged(voices: Voices, spec: EvaluateSpec, device: torch.device) -> tuple[Score, dict[str, float]]:
    """(the task's score, its other figures by their names in ModelReport)."""
    if spec.task == "mlm":
        loss, score = _token_scores(voices, spec, device, "masked accuracy")
        return score, {"mlm_loss": loss}
    if spec.task == "clm":
        loss, score = _token_scores(voices, spec, device, "next-token accuracy")
        return score, {"clm_loss": loss, "perplexity": math.exp(loss)}
    if spec.task == "regression":
        truth_N, said_N = _number_outcomes(voices, spec, device)
        rmse = float(np.sqrt(np.square(truth_N - said_N).mean()))
        return spearman(truth_N, said_N), {"pearson": correlation(truth_N, said_N), "rmse": rmse}
    if spec.task == "token_classification":
        return _tag_scores(voices, spec, device)
    if spec.task == "question_answering":
        score, exact = _answer_scores(voices, spec, device)
        return score, {"exact_match": exact}
    if spec.task == "embedding":
        return wilson("retrieval accuracy", _found_halves(voices, spec, device)), {}
    truth, guesses = class_outcomes(voices, spec, device)
    f1 = float(f1_score(truth, guesses, average="macro"))
    return wilson("accuracy", truth == guesses), {"macro_f1": f1}


def _size_on_disk(model: str) -> int:
    """Bytes of the weights in a directory; 0 for a hub name, whose files lie in the hub client's cache."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))


def batches(spec: EvaluateSpec) -> Iterator[TokenBatch]:
    """Every row of the split once; of labelled examples those that have a label."""
    return (batch for _, batch in _located(spec))


def _located(spec: EvaluateSpec) -> Iterator[tuple[Slot, TokenBatch]]:
    """With where they are in the store."""
    rows = TokenStore(spec.store).bucket_rows(spec.split, labelled=takes_labels(spec.task))
    source = SourceSpec(spec.store, spec.split, Manifest(rows, 1, spec.config.batch_size, MASK_SEED), spec.masking)
    maker = MicroBatches(source)
    return ((source.manifest.slot(n), maker.make(n)) for n in range(source.manifest.num_micro_batches))


def _mixed(said: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Logits of the mean prediction."""
    logits, weights = zip(*said, strict=True)
    return mixed_logits(logits, weights, temperature=1.0)


def _said(voices: Voices, inputs: Inputs) -> torch.Tensor:
    """[N, C] logits of what their heads say together."""
    return _mixed([(model(inputs)[1], weight) for model, weight in voices])


def class_outcomes(
    voices: Voices, spec: EvaluateSpec, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(true classes, predicted classes), one a row."""
    truth_N, logits_NC = class_logits(voices, spec, device)
    return truth_N, logits_NC.argmax(-1)


@torch.inference_mode()
def class_logits(
    voices: Voices, spec: EvaluateSpec, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(true classes [N], logits [N, C] of the mean prediction) of every row."""
    truth, said = [], []
    for batch in batches(spec):
        assert batch.labels_B is not None
        truth.append(batch.labels_B.astype(np.int64))
        said.append(_said(voices, on_device(batch, device)).float().cpu().numpy())
    return np.concatenate(truth), np.concatenate(said)


@torch.inference_mode()
def _number_outcomes(voices: Voices, spec: EvaluateSpec, device: torch.device) -> tuple[Floats, Floats]:
    """(true numbers, predicted ones), one a row; of several teachers the weighted mean."""
    truth, said = [], []
    for batch in batches(spec):
        spoken = [model(on_device(batch, device))[1] for model, _ in voices]
        assert batch.labels_B is not None
        truth.append(batch.labels_B.astype(np.float64))
        said.append(mean_logits(spoken, [weight for _, weight in voices])[:, 0].cpu().numpy().astype(np.float64))
    return np.concatenate(truth), np.concatenate(said)


def _tag_scores(voices: Voices, spec: EvaluateSpec, device: torch.device) -> tuple[Score, dict[str, float]]:
    truth, said = _tag_outcomes(voices, spec, device)
    hits = np.concatenate([np.array(known) == np.array(named) for known, named in zip(truth, said, strict=True)])
    accuracy = wilson("accuracy", hits)
    if marks_entities(spec.labels):
        return entity_f1(truth, said), {"accuracy": accuracy.value}
    flat = [[tag for row in rows for tag in row] for rows in (truth, said)]
    return accuracy, {"macro_f1": float(f1_score(*flat, average="macro"))}


@torch.inference_mode()
def _tag_outcomes(voices: Voices, spec: EvaluateSpec, device: torch.device) -> tuple[list[list[str]], list[list[str]]]:
    """(true classes, predicted classes) of the words of every row."""
    names = np.array(spec.labels)
    truth, said = [], []
    for batch in batches(spec):
        inputs = on_device(batch, device)
        guesses_BL = np.zeros(batch.input_ids_BL.shape, np.int64)
        guesses_BL[inputs.mask_BL.cpu().numpy()] = _said(voices, inputs).argmax(-1).cpu().numpy()
        assert batch.tags_BL is not None
        for tags_L, guesses_L in zip(batch.tags_BL, guesses_BL, strict=True):
            truth.append(names[tags_L[tags_L >= 0]].tolist())
            said.append(names[guesses_L[tags_L >= 0]].tolist())
    return truth, said


@torch.inference_mode()
def _answer_scores(voices: Voices, spec: EvaluateSpec, device: torch.device) -> tuple[Score, float]:
    """(F1, exact match) of the best spans of all windows of each question."""
    store = TokenStore(spec.store)
    questions = store.questions(spec.split)
    may_lack = any(question.answers == [] for question in questions)
    found: dict[int, Found] = defaultdict(Found)
    for slot, batch in _located(spec):
        numbers_B, chars_BL2 = (store.extra(spec.split, slot.bucket, slot.rows, name) for name in ("question", "chars"))
        logits_B2L = _said(voices, on_device(batch, device)).view(len(numbers_B), 2, -1).cpu().numpy()
        for number, (starts_L, ends_L), chars_L2 in zip(numbers_B[:, 0].tolist(), logits_B2L, chars_BL2, strict=True):
            found[number] = found[number].after(starts_L, ends_L, chars_L2.reshape(-1, 2))
    asked = [(each, questions[number]) for number, each in found.items()]
    said = [each.answer(question.context, may_lack) for each, question in asked]
    return answer_scores(said, [question.answers or [] for _, question in asked])


@torch.inference_mode()
def _found_halves(voices: Voices, spec: EvaluateSpec, device: torch.device) -> NDArray[np.bool_]:
    """Whether the vector of each text's first half is nearest to that of its second half, among MOST_HALVES texts."""
    firsts, seconds = list[torch.Tensor](), list[torch.Tensor]()
    for batch in batches(spec):
        for half, found in ((0, firsts), (1, seconds)):
            inputs = _halves(on_device(batch, device), half)
            spoken = [model(inputs)[1] for model, _ in voices] if len(inputs.ids_BL) else []
            found += [mean_logits(spoken, [weight for _, weight in voices])] if spoken else []
        if sum(len(part) for part in firsts) >= MOST_HALVES:
            break
    if not firsts:
        raise DataError(f"expected texts of {2 * LEAST_TOKENS + 2} tokens to score vectors by, found none that long")
    first_ND, second_ND = (F.normalize(torch.cat(part), dim=-1) for part in (firsts, seconds))
    nearest_N = (first_ND @ second_ND.T).argmax(-1).cpu()
    return (nearest_N == torch.arange(len(nearest_N))).numpy()


def _halves(inputs: Inputs, half: int) -> Inputs:
    """One half of the tokens of each row that is long enough, between its own first and last token."""
    lengths_B = inputs.mask_BL.sum(-1)
    kept = lengths_B >= 2 * LEAST_TOKENS + 2
    ids_BL, lengths_B = inputs.ids_BL[kept], lengths_B[kept]
    places_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    middle_B1, ends_B1 = (lengths_B[:, None] // 2), lengths_B[:, None] - 1
    body_BL = (places_L >= 1) & (places_L < middle_B1) if half == 0 else (places_L >= middle_B1) & (places_L < ends_B1)
    mask_BL = body_BL | (places_L == 0) | (places_L == ends_B1)
    order_BL = (~mask_BL).long().argsort(dim=-1, stable=True)  # what is kept moves to the front
    return Inputs(ids_BL.gather(1, order_BL), mask_BL.gather(1, order_BL))


@torch.inference_mode()
def _token_scores(voices: Voices, spec: EvaluateSpec, device: torch.device, metric: str) -> tuple[float, Score]:
    """(mean cross-entropy in nats, share found) of the tokens that have a label."""
    losses, hits = [], []
    for states, labels_n in _labelled_states(voices, spec, device):
        spoken = zip(voices, states, strict=True)
        logits_nV = _mixed([(model.vocabulary_logits(states_nD), weight) for (model, weight), states_nD in spoken])
        losses.append(F.cross_entropy(logits_nV, labels_n, reduction="none").cpu().numpy())
        hits.append((logits_nV.argmax(-1) == labels_n).cpu().numpy())
    return float(np.concatenate(losses).mean()), wilson(metric, np.concatenate(hits))


def _labelled_states(
    voices: Voices, spec: EvaluateSpec, device: torch.device
) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """(each model's last states [n, D], labels [n]) of tokens that have a label, a few at a time."""
    for batch in batches(spec):
        inputs = on_device(batch, device)
        labels_T = torch.from_numpy(np.asarray(batch.labels_BL, np.int64)).to(device)[inputs.mask_BL]
        at_T = labels_T != IGNORE
        last = [model(inputs, (model.num_layers,))[0][model.num_layers][at_T] for model, _ in voices]
        parts = (torch.split(part, PLACES_AT_ONCE) for part in (*last, labels_T[at_T]))
        yield from ((tuple(states), labels_n) for *states, labels_n in zip(*parts, strict=True))


def latencies_ms(spec: EvaluateSpec, candidates: list[Candidate]) -> list[float]:
    """Median milliseconds of a one-row forward pass of each, the rounds interleaved so that noise hits all alike."""
    torch.set_num_threads(1)
    models = [[load_model(model, spec.task, spec.labels).eval() for model in each.models] for each in candidates]
    length = spec.config.latency_length
    sizes = [model.config.vocab_size for each in models for model in each]
    ids = torch.arange(1000, 1000 + length)[None, :] % min(sizes, default=1)
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_number in range(spec.config.latency_rounds + 5):
            for each, measured in zip(models, times, strict=True):
                started = time.perf_counter()
                for model in each:
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
                if round_number >= 5:  # the first rounds warm up
                    measured.append(1000 * (time.perf_counter() - started))
    return [statistics.median(measured) for measured in times]
