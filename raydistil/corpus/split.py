"""Which split a row belongs to, and whether its label is used: functions of its text or module alone."""

from dataclasses import replace
from hashlib import blake2b

from raydistil.config import CorpusConfig
from raydistil.types import Split, TextRow


def split_of(key: str, config: CorpusConfig) -> Split:
    """The split of everything that shares `key` (a module, a text)."""
    point = _point(key, b"split")
    test_share = 0.0 if config.test_source else config.test_share
    validation_share = 0.0 if config.validation_source else config.validation_share
    if point < test_share:
        return "test"
    return "validation" if point < test_share + validation_share else "train"


def with_shared_label(row: TextRow, share: float) -> TextRow:
    """`row`, without its label if it is a training row that is not in the labelled `share`."""
    hidden = row.split == "train" and _point(row.text, b"label") >= share
    return replace(row, label=None, tags=None, answers=None) if hidden else row


def _point(key: str, purpose: bytes) -> float:
    """Uniform in [0, 1)."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8, person=purpose).digest()) / 2**64
