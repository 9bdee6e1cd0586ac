"""evaluate: checkpoints -> one table, with every score beside the teacher's.

Classification: accuracy with its Wilson interval, and macro F1. Regression: Spearman's rank correlation with its
bootstrap interval, Pearson's, and the root of the mean squared error. Masked-LM: the share of masked tokens found and
the mean cross-entropy at them, on masks that depend on nothing but the text's place, so every model meets the same
ones. Causal LM: the share of next tokens found, the mean cross-entropy of each given those of its document before it in
the block, and its exponential, the perplexity.
Several teachers count as one, by the weighted mean of what they hold probable, or of their numbers; their times add up.
Latency: median over interleaved rounds, one row, one thread, float32.
"""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from raydistil.ensemble import mean_logits, mixed_logits
from raydistil.manifest import Manifest
from raydistil.models import Headed, HeadedEncoder, load_model, num_parameters, on_device, positions_on
from raydistil.size import describe_model
from raydistil.source import MicroBatches
from raydistil.specs import Candidate, EvaluateSpec, ModelReport, SourceSpec
from raydistil.targets import PLACES_AT_ONCE
from raydistil.tokens import TokenStore
from raydistil.types import IGNORE, Score, TokenBatch, labels_texts

Z95 = 1.959964
Voices = list[tuple[Headed, float]]  # models and their weights
Floats = NDArray[np.float64]
RESAMPLES, BOOTSTRAP_SEED = 1000, 1979
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
    truth, guesses = class_outcomes(voices, spec, device)
    f1 = float(f1_score(truth, guesses, average="macro"))
    return wilson("accuracy", truth == guesses), {"macro_f1": f1}


def _size_on_disk(model: str) -> int:
    """Bytes of the weights in a directory; 0 for a hub name, whose files lie in the hub client's cache."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))


def batches(spec: EvaluateSpec) -> Iterator[TokenBatch]:
    """Every row of the split once; of labelled examples those that have a label."""
    rows = TokenStore(spec.store).bucket_rows(spec.split, labelled=labels_texts(spec.task))
    source = SourceSpec(spec.store, spec.split, Manifest(rows, 1, spec.config.batch_size, MASK_SEED), spec.masking)
    maker = MicroBatches(source)
    return (maker.make(index) for index in range(source.manifest.num_micro_batches))


def _mixed(said: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Logits of the mean prediction."""
    logits, weights = zip(*said, strict=True)
    return mixed_logits(logits, weights, temperature=1.0)


@torch.inference_mode()
def class_outcomes(
    voices: Voices, spec: EvaluateSpec, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(true classes, predicted classes), one a row."""
    truth, guesses = [], []
    for batch in batches(spec):
        logits = _mixed([(model(*on_device(batch, device))[1], weight) for model, weight in voices])
        assert batch.labels_B is not None
        truth.append(batch.labels_B.astype(np.int64))
        guesses.append(logits.argmax(-1).cpu().numpy())
    return np.concatenate(truth), np.concatenate(guesses)


@torch.inference_mode()
def _number_outcomes(voices: Voices, spec: EvaluateSpec, device: torch.device) -> tuple[Floats, Floats]:
    """(true numbers, predicted ones), one a row; of several teachers the weighted mean."""
    truth, said = [], []
    for batch in batches(spec):
        spoken = [model(*on_device(batch, device))[1] for model, _ in voices]
        assert batch.labels_B is not None
        truth.append(batch.labels_B.astype(np.float64))
        said.append(mean_logits(spoken, [weight for _, weight in voices])[:, 0].cpu().numpy().astype(np.float64))
    return np.concatenate(truth), np.concatenate(said)


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
        ids_BL, mask_BL = on_device(batch, device)
        labels_T = torch.from_numpy(np.asarray(batch.labels_BL, np.int64)).to(device)[mask_BL]
        at_T, positions = labels_T != IGNORE, positions_on(batch, device)
        last = [
            model(ids_BL, mask_BL, (model.num_layers,), positions)[0][model.num_layers][at_T] for model, _ in voices
        ]
        parts = (torch.split(part, PLACES_AT_ONCE) for part in (*last, labels_T[at_T]))
        yield from ((tuple(states), labels_n) for *states, labels_n in zip(*parts, strict=True))


def wilson(metric: str, hits: NDArray[np.bool_]) -> Score:
    """Share of hits with its 95 % Wilson score interval (Wilson 1927)."""
    n, share = len(hits), float(hits.mean())
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Score(metric, share, centre - half, centre + half, n)


def correlation(first_N: Floats, second_N: Floats) -> float:
    """Pearson's; 0 where all numbers of a side are the same."""
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return 0.0
    one_N, other_N = (side_N - side_N.mean() for side_N in (first_N, second_N))
    return float(np.clip(one_N @ other_N / (np.linalg.norm(one_N) * np.linalg.norm(other_N)), -1, 1))


def spearman(truth_N: Floats, said_N: Floats) -> Score:
    """Pearson's correlation of the ranks (Spearman 1904), with a 95 % interval.

    That one: percentiles over RESAMPLES bootstrap samples of the rows (Efron 1979), the same ones for every model.
    """
    random, n = np.random.default_rng(BOOTSTRAP_SEED), len(truth_N)
    drawn = (random.integers(0, n, n) for _ in range(RESAMPLES))
    found = [_rank_correlation(truth_N[rows_N], said_N[rows_N]) for rows_N in drawn]
    low, high = np.percentile(found, (2.5, 97.5)).tolist()
    return Score("Spearman", _rank_correlation(truth_N, said_N), low, high, n)


def _rank_correlation(first_N: Floats, second_N: Floats) -> float:
    return correlation(ranks(first_N), ranks(second_N))


def ranks(numbers_N: Floats) -> Floats:
    """From 1 on, ascending; equal numbers share the mean of theirs."""
    _, places_N, counts = np.unique(numbers_N, return_inverse=True, return_counts=True)
    means: Floats = np.cumsum(counts) - (counts - 1) / 2
    return means[places_N]


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
