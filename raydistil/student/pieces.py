"""The pieces of a tokenizer that a corpus needs, and a tokenizer.json with those alone: it cuts the corpus as before.

WordPiece  takes the longest piece that fits. What was taken still fits, and nothing longer does.
BPE        joins the two neighbours that its list of joins names first, again and again. Every join on the way to a
           piece that is used stays, in the old order, so the first that fits is the same one each time. A tokenizer
           that takes known words whole before it joins anything (`ignore_merges`) still knows the words of the corpus,
           and no others than before.
Unigram    takes the cut with the highest sum of scores, which is also the highest of fewer. A character that has no
           piece scores the lowest of all pieces less 10, so the lowest piece stays too.

V pieces, W of them kept.
"""

import json
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from raydistil.errors import ModelError

KINDS = ("WordPiece", "BPE", "Unigram")
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))  # what spells a character that has no piece

# The contents of a tokenizer.json, and its part `model`.
Content = dict[str, Any]
Model = dict[str, Any]


def content_of(tokenizer: PreTrainedTokenizerBase) -> Content:
    """Raises ModelError for a tokenizer without a tokenizer.json, or of a kind that cannot be pruned."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"expected a fast tokenizer to prune (one with a tokenizer.json), got {type(tokenizer).__name__}, which is "
            f"Python only: keep the whole vocabulary"
        )
    content: Content = json.loads(backend.to_str())
    if content["model"]["type"] not in KINDS:
        raise ModelError(
            f"expected a tokenizer of kind {', '.join(KINDS)} to prune, got {content['model']['type']}: keep the whole "
            f"vocabulary"
        )
    return content


def ids_of(model: Model) -> dict[str, int]:
    """{piece: id}."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}


# ---- which


def kept_ids(
    content: Content, counts_V: NDArray[np.int64], min_count: int, whole_alphabet: bool = False
) -> NDArray[np.int64]:
    """[W] ascending: the pieces that occur at least `min_count` times and what their cutting takes, what those that
    occur at all (`whole_alphabet`: all there are) are spelt with, every byte, and every added or unknown token."""
    model = content["model"]
    ids = ids_of(model)
    found = [piece for piece, number in ids.items() if number < len(counts_V) and counts_V[number]]
    frequent = {piece for piece in found if counts_V[ids[piece]] >= min_count}
    letters = _letters(model, list(ids) if whole_alphabet else found)
    wanted = frequent | _taken(model, frequent) | letters | BYTES
    kept = {ids[piece] for piece in wanted if piece in ids} | {token["id"] for token in content["added_tokens"]}
    return np.array(sorted(kept | _unknown(model, ids)), np.int64)


def _unknown(model: Model, ids: dict[str, int]) -> set[int]:
    number = model["unk_id"] if model["type"] == "Unigram" else ids.get(model["unk_token"])
    return set() if number is None else {number}


def _letters(model: Model, pieces: list[str]) -> set[str]:
    """The pieces of one character that `pieces` can be spelt with, and those of one byte."""
    prefix, suffix = _prefix(model), _suffix(model)
    letters = {letter for piece in pieces for letter in piece.removeprefix(prefix).removesuffix(suffix)}
    letters |= set(ByteLevel.alphabet()) if model["type"] == "BPE" else set()
    return {form for letter in letters for form in (letter, prefix + letter, letter + suffix)}


def _prefix(model: Model) -> str:
    """Of a piece that goes on a word."""
    return model.get("continuing_subword_prefix") or ""


def _suffix(model: Model) -> str:
    """Of a piece that ends a word."""
    return model.get("end_of_word_suffix") or ""


def _taken(model: Model, pieces: set[str]) -> set[str]:
    """What the cut into `pieces` depends on, beside them."""
    if model["type"] == "BPE":
        ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        return {passed for piece in pieces for passed in _way_to(piece, model, ranks)}
    return {min(model["vocab"], key=lambda entry: entry[1])[0]} if model["type"] == "Unigram" else set()


def _way_to(piece: str, model: Model, ranks: dict[tuple[str, ...], int]) -> set[str]:
    """The pieces that lie between the characters of `piece` and it; none where no joins lead to it.

    In a text the joins inside what becomes `piece` are these too, since none goes over its ends.
    """
    parts = _characters(piece, model)
    passed = set(parts)
    while len(parts) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            return set()
        parts[place : place + 2] = [_joined(parts[place], parts[place + 1], model)]
        passed.add(parts[place])
    return passed


def _characters(piece: str, model: Model) -> list[str]:
    """What a text holds before anything is joined, where it comes to hold `piece`."""
    prefix, suffix = _prefix(model), _suffix(model)
    letters = piece.removeprefix(prefix).removesuffix(suffix)
    parts = [letters[:1], *(prefix + letter for letter in letters[1:])]
    parts[0] = prefix * piece.startswith(prefix) + parts[0]
    parts[-1] += suffix * piece.endswith(suffix)
    return parts


def _joined(first: str, second: str, model: Model) -> str:
    return first + second.removeprefix(_prefix(model))


# ---- without the others


def renumbered(content: Content, new_ids: dict[int, int]) -> Content:
    """`content` with the pieces whose old ids are keys of `new_ids`, and a new id wherever there was an old one."""
    padding = content["padding"]
    return content | {
        "model": _fewer(content["model"], new_ids),
        "added_tokens": [token | {"id": new_ids[token["id"]]} for token in content["added_tokens"]],
        "post_processor": _processor(content["post_processor"], new_ids),
        "padding": padding and padding | {"pad_id": new_ids[padding["pad_id"]]},
    }


def _fewer(model: Model, new_ids: dict[int, int]) -> Model:
    if model["type"] == "Unigram":
        vocab = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
        return model | {"vocab": vocab, "unk_id": new_ids.get(model["unk_id"])}
    pieces = sorted((new_ids[number], piece) for piece, number in model["vocab"].items() if number in new_ids)
    fewer = model | {"vocab": {piece: number for number, piece in pieces}}
    return fewer | {"merges": _joins(fewer)} if model["type"] == "BPE" else fewer


def _joins(model: Model) -> list[list[str]]:
    """Those of two pieces of the vocabulary to a third."""
    vocab = model["vocab"]
    return [
        [first, second]
        for first, second in model["merges"]
        if first in vocab and second in vocab and _joined(first, second, model) in vocab
    ]


def _processor(processor: dict[str, Any] | None, new_ids: dict[int, int]) -> dict[str, Any] | None:
    """What puts special tokens around a text: by a template that lists their ids, as pairs of token and id, or one of
    these after another."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        return processor | {"processors": [_processor(each, new_ids) for each in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"].items()
        return processor | {
            "special_tokens": {name: use | {"ids": [new_ids[old] for old in use["ids"]]} for name, use in tokens}
        }
    pairs = {key: processor[key] for key in ("sep", "cls") if key in processor}
    return processor | {key: [token, new_ids[old]] for key, (token, old) in pairs.items()}
