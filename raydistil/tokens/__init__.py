"""tokens: rows -> token store, and reading it back.

examples.py   rows out of texts, words with classes, questions with their contexts
files.py      the Arrow files
store.py      what a store holds, and reading it
writer.py     writing one, unless it is in the cache
"""

from raydistil.tokens.store import SplitCounts, StoreMeta, TokenStore
from raydistil.tokens.writer import build_store, class_names, data_classes, encode, tokenizer_hash

__all__ = [
    "SplitCounts", "StoreMeta", "TokenStore", "build_store", "class_names", "data_classes", "encode", "tokenizer_hash",
]  # fmt: skip
