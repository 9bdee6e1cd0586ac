"""A model and its tokenizer with the pieces a corpus uses, and no others.

Half of a small encoder's parameters are embeddings of pieces its corpus never uses (Abdaoui et al. 2020, "Load what you
need"). What is left cuts the corpus as before (see pieces.py) and gives the same hidden states and, at the pieces kept,
the same logits. V pieces, W of them kept.
"""

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raydistil.errors import ModelError
from raydistil.student.layers import filled, fresh
from raydistil.student.pieces import Content, content_of, ids_of, kept_ids, renumbered


@dataclass(frozen=True)
class Pruned:
    """A smaller pair; the model's new id n is the old id kept_ids_W[n]."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept_ids_W: NDArray[np.int64]  # ascending


def prune_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, counts_V: NDArray[np.int64], min_count: int = 1,
    whole_alphabet: bool = False,
) -> Pruned:  # fmt: skip
    """Keep the pieces that `counts_V` says occur at least `min_count` times, what their cutting takes, every special or
    added token, and the pieces of one character or byte that pieces which occur at all are made of, so that those can
    still be spelt. Byte-level BPE keeps every byte, so it still spells any text; with `whole_alphabet` the others keep
    every character they have, so that they still spell what they could.

    With min_count 1, every text that was counted as a whole is cut as before, except words that gave WordPiece's
    unknown token: these may now be cut into pieces. Above 1, rarer pieces fall apart into shorter ones. Neither input
    is changed.

    Raises ModelError for tokenizers that are Python only or of another kind than WordPiece, BPE and Unigram, where the
    model lacks a row for a token, and where the padding id would move although positions are counted from it.
    """
    content = content_of(tokenizer)
    kept_ids_W = kept_ids(content, counts_V, min_count, whole_alphabet)
    new_ids = {int(old): new for new, old in enumerate(kept_ids_W)}
    _check_rows(model, new_ids)
    _check_padding(model, new_ids)
    return Pruned(_pruned_model(model, new_ids), _read_back(tokenizer, renumbered(content, new_ids)), kept_ids_W)


def _check_rows(model: PreTrainedModel, new_ids: dict[int, int]) -> None:
    words: Any = model.get_input_embeddings()
    rows, last = len(words.weight), max(new_ids)
    if last >= rows:
        raise ModelError(
            f"expected an embedding for every token, got {rows:,} for a tokenizer with the id {last:,}: keep the whole "
            f"vocabulary"
        )


def _check_padding(model: PreTrainedModel, new_ids: dict[int, int]) -> None:
    """RoBERTa and MPNet number positions from the padding id + 1."""
    words: Any = model.get_input_embeddings()
    pad = words.padding_idx
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words]
    if pad is not None and new_ids.get(pad) != pad and any(table.padding_idx == pad for table in tables):
        raise ModelError(
            f"expected no piece below the padding token to go, since {type(model).__name__} counts positions from its "
            f"id {pad}, which would become {new_ids.get(pad)}: keep the whole vocabulary"
        )


# ---- the pair


def _pruned_model(model: PreTrainedModel, new_ids: dict[int, int]) -> PreTrainedModel:
    config: Any = copy.deepcopy(model.config)
    config.vocab_size = len(new_ids)
    _renumber(config, new_ids)
    index_W = from_numpy(np.array(list(new_ids), np.int64))
    by_piece = _by_piece(model)
    weights: dict[str, Tensor] = {
        name: tensor.detach()[index_W] if name in by_piece else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    student = filled(fresh(model, config), weights, model)
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
        _renumber(student.generation_config, new_ids)
    student.train(model.training)
    return student


def _renumber(config: Any, new_ids: dict[int, int]) -> None:
    """Every `.._token_id`, of which a use may have several; None where there is no such piece any more."""
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, list):
            setattr(config, key, [new_ids[old] for old in value if old in new_ids] or None)
        elif key.endswith("_token_id"):
            setattr(config, key, new_ids.get(value))


def _by_piece(model: PreTrainedModel) -> set[str]:
    """Names of the tensors with one row a piece: the embeddings, and weight and biases of a language model's head."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(part.weight) for part in parts if part is not None}
    inside, size = f"{model.base_model_prefix}.", (model.config.vocab_size,)
    return {
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in tables or (name.endswith(".bias") and tensor.shape == size and not name.startswith(inside))
    }


def _read_back(tokenizer: PreTrainedTokenizerBase, content: Content) -> PreTrainedTokenizerBase:
    """`tokenizer` with other content, read from its files. Raises ModelError where its class makes another of it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf8")
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if _numbers(content_of(found)) != _numbers(content):
        raise ModelError(
            f"expected a tokenizer that is read as it was written, got {type(found).__name__}, which gives some tokens "
            f"ids of its own: keep the whole vocabulary"
        )
    return found


def _numbers(content: Content) -> list[Any]:
    model = content["model"]
    return [ids_of(model), model.get("unk_id"), content["added_tokens"], content["post_processor"]]
