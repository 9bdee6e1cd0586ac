"""What a model takes without a server, and the texts that servers are asked about."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydistil.config import CorpusConfig
from raydistil.corpus.python_docs import list_files, read
from raydistil.serve.backends import Row
from raydistil.serve.model import load
from raydistil.serve.schema import Source, Wish
from raydistil.serve.served import Hardware

TEXTS, MEAN_WORDS, SIGMA = 512, 22.5, 0.6  # lengths are log-normal, as those of queries are


@dataclass(frozen=True, slots=True)
class Asked:
    """What servers are asked, and what they run it with."""

    backend: Wish
    texts: tuple[str, ...]
    mean_tokens: float


def asked(source: Source, hardware: Hardware) -> Asked:
    """The backend that is the fastest for `source`, and texts: beginnings of docstrings, of mixed length."""
    model, draws = load(source, hardware), np.random.default_rng(0)
    config = CorpusConfig(source="python-docs", max_rows=TEXTS)
    rows = [row.text.split() for row in read(config, list_files(("torch", "pandas", "ray", "networkx"))).rows]
    words = np.exp(draws.normal(np.log(MEAN_WORDS) - SIGMA**2 / 2, SIGMA, len(rows)))
    texts = tuple(" ".join(row[: max(3, round(count))]) for row, count in zip(rows, words, strict=True))
    tokens = [each.tokens for each in model.reader.texts(texts, "right")]
    backend: Any = model.backend.name
    return Asked(backend, texts, float(np.mean(tokens)))


def alone_ms(
    source: Source, hardware: Hardware, texts: tuple[str, ...], rate: float, seconds: float, seed: int
) -> float:  # fmt: skip
    """Median of reading a text and running the backend on it, at times as they come to an idle server."""
    model, draws, taken_s = load(source, hardware), np.random.default_rng(seed), list[float]()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken_s) < 3:
        time.sleep(draws.exponential(1 / rate))
        started = time.perf_counter()
        (encoded,) = model.reader.texts([texts[len(taken_s) % len(texts)]], "right")
        model.backend.run([Row(encoded.ids)])
        taken_s.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken_s)
