"""Which split a row belongs to: a function of its key alone, the same on every machine and in every run."""

from hashlib import blake2b

from raydistil.config import CorpusConfig
from raydistil.types import Split


def split_of(key: str, config: CorpusConfig) -> Split:
    """The split of everything that shares `key` (a module, a text)."""
    point = int.from_bytes(blake2b(key.encode(), digest_size=8, person=b"split").digest()) / 2**64
    test_share = 0.0 if config.test_source else config.test_share
    validation_share = 0.0 if config.validation_source else config.validation_share
    if point < test_share:
        return "test"
    return "validation" if point < test_share + validation_share else "train"
