"""How large a cache is going to be, and how it is cut into shards. Before compression, so an upper bound but for luck.

bytes = tokens * per_token + rows * per_row, for every variant.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistil.codecs.states import bytes_per_token
from raydistil.config import digest
from raydistil.places import compared_share
from raydistil.specs import CacheSpec, SourceSpec, TargetsSpec
from raydistil.targets import soft_label_codec
from raydistil.tokens import TokenStore
from raydistil.types import Task, models_language

GROUP_BYTES = 256 << 10  # the least that is read for a row
SHARD_BYTES = 32 << 20
SHARD_ROWS = 1024  # at most: what a kill may cost
ID_BYTES = 4
ROW_BYTES = 40  # its number, and where its lists begin


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a cache."""

    per_token: float
    per_row: float

    def of(self, tokens: float, rows: float) -> int:
        return int(tokens * self.per_token + rows * self.per_row)


def sizes_of(task: Task, wanted: TargetsSpec, masked: float, width: int, classes: int) -> Sizes:
    """`masked`: share of masked tokens; `width` of the hidden states; `classes`: see `num_logits`."""
    states = len(wanted.states) * bytes_per_token(width, wanted.config.states)
    if not wanted.soft_labels:
        return Sizes(ID_BYTES + states, ROW_BYTES)
    place = soft_label_codec(wanted.config).bytes_per_place(classes)
    if task == "token_classification":
        return Sizes(ID_BYTES + states + place, ROW_BYTES)
    if not models_language(task):
        return Sizes(ID_BYTES + states, ROW_BYTES + place * (2 if task == "question_answering" else 1))
    share = compared_share(wanted.loss, masked if task == "mlm" else 1.0)
    return Sizes(ID_BYTES + states + share * (place + ID_BYTES), ROW_BYTES)


def num_logits(task: Task, num_labels: int, shape: Any, length: int) -> int:
    """The C of `heads`, or the vocabulary, for a model of this configuration and rows of `length`."""
    sizes = {"regression": 1, "question_answering": length, "embedding": shape.hidden_size}
    return int(shape.vocab_size if models_language(task) else sizes.get(task, num_labels))


def cache_spec(
    root: Path, inputs: dict[str, Any], targets: TargetsSpec, source: SourceSpec, sizes: Sizes
) -> CacheSpec:  # fmt: skip
    """The cache below `root` for these inputs, of as many variants as the run's epochs get to."""
    fingerprint = digest(inputs)
    lengths = TokenStore(source.store).lengths(source.split)
    cuts = [_cut(sizes.of(length, 1)) for length in lengths]
    variants = min(source.variants or 1, source.manifest.epochs)
    return CacheSpec(
        root.expanduser().absolute() / fingerprint, fingerprint, targets, source.manifest.bucket_rows, variants,
        tuple(shard for shard, _ in cuts), tuple(group for _, group in cuts),
    )  # fmt: skip


def _cut(row_bytes: int) -> tuple[int, int]:
    """(rows of a shard, rows of a row group); groups fill a shard."""
    group = max(1, min(SHARD_ROWS, GROUP_BYTES // row_bytes))
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes) // group) * group, group
