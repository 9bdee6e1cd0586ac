"""A model and its WordPiece tokenizer with the pieces a corpus uses, and no others.

Half of a small encoder's parameters are embeddings of pieces its corpus never uses (Abdaoui et al. 2020, "Load what you
need"). What is left cuts the corpus as before and gives the same hidden states and, at the pieces kept, the same
logits. V pieces, W of them kept.
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

PREFIX = "##"  # of a piece that goes on a word


@dataclass(frozen=True)
class Pruned:
    """A smaller pair; the model's new id n is the old id kept_ids_W[n]."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kept_ids_W: NDArray[np.int64]  # ascending


def prune_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, counts_V: NDArray[np.int64], min_count: int = 1
) -> Pruned:
    """Keep the pieces that `counts_V` says occur at least `min_count` times, every special or added token, and the
    pieces of one character that pieces which occur at all are made of, so that those can still be spelt.

    With min_count 1, every text that was counted is cut as before, except words that gave the unknown token: these may
    now be cut into pieces. Above 1, rarer pieces fall apart into shorter ones. Neither input is changed.

    Raises ModelError for tokenizers that are not WordPiece, and where the padding id would move although positions are
    counted from it.
    """
    content = _content(tokenizer)
    kept_ids_W = _kept(content, counts_V, min_count)
    new_ids = {int(old): new for new, old in enumerate(kept_ids_W)}
    _check_padding(model, tokenizer, new_ids)
    return Pruned(_pruned_model(model, new_ids), _pruned_tokenizer(tokenizer, content, new_ids), kept_ids_W)


# ---- pieces


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"model": {"type": "none"}} if backend is None else json.loads(backend.to_str())
    kind = content["model"]["type"]
    if kind != "WordPiece" or content["model"]["continuing_subword_prefix"] != PREFIX:
        raise ModelError(
            f"expected a WordPiece tokenizer to prune, got {kind}: a piece of another kind is reached through pieces "
            f"that would be gone, so keep the whole vocabulary"
        )
    return content


def _kept(content: dict[str, Any], counts_V: NDArray[np.int64], min_count: int) -> NDArray[np.int64]:
    pieces: dict[str, int] = content["model"]["vocab"]
    kept = {token["id"] for token in content["added_tokens"]} | {pieces[content["model"]["unk_token"]]}
    for piece, number in pieces.items():
        count = counts_V[number] if number < len(counts_V) else 0
        if count >= min_count:
            kept.add(number)
        if count:
            spelt = (form + character for character in piece.removeprefix(PREFIX) for form in ("", PREFIX))
            kept |= {pieces[single] for single in spelt if single in pieces}
    return np.array(sorted(kept), np.int64)


def _check_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_ids: dict[int, int]) -> None:
    """RoBERTa and MPNet number positions from the padding id + 1."""
    words, pad = model.get_input_embeddings(), tokenizer.pad_token_id
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words]
    if pad is not None and new_ids[pad] != pad and any(table.padding_idx == pad for table in tables):
        raise ModelError(
            f"expected no piece below the padding token to go, since {type(model).__name__} counts positions from its "
            f"id {pad}, which would become {new_ids[pad]}: keep the whole vocabulary"
        )


# ---- the pair


def _pruned_model(model: PreTrainedModel, new_ids: dict[int, int]) -> PreTrainedModel:
    config: Any = copy.deepcopy(model.config)
    config.vocab_size = len(new_ids)
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, int):
            setattr(config, key, new_ids.get(value))
    index_W = from_numpy(np.array(list(new_ids), np.int64))
    by_piece = _by_piece(model)
    weights: dict[str, Tensor] = {
        name: tensor.detach()[index_W] if name in by_piece else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    student = filled(fresh(model, config), weights, model)
    student.train(model.training)
    return student


def _by_piece(model: PreTrainedModel) -> set[str]:
    """Names of the tensors with one row a piece: the embeddings, and weight and biases of a masked-LM head."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(part.weight) for part in parts if part is not None}
    inside, size = f"{model.base_model_prefix}.", (model.config.vocab_size,)
    return {
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in tables or (name.endswith(".bias") and tensor.shape == size and not name.startswith(inside))
    }


def _pruned_tokenizer(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], new_ids: dict[int, int]
) -> PreTrainedTokenizerBase:
    """The tokenizer read back from files in which every id is a new one."""
    model = content["model"]
    pieces = sorted((new_ids[number], piece) for piece, number in model["vocab"].items() if number in new_ids)
    renumbered = content | {
        "model": model | {"vocab": {piece: number for number, piece in pieces}},
        "added_tokens": [token | {"id": new_ids[token["id"]]} for token in content["added_tokens"]],
        "post_processor": _renumbered(content["post_processor"], new_ids),
        "padding": content["padding"] and content["padding"] | {"pad_id": new_ids[content["padding"]["pad_id"]]},
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(renumbered, ensure_ascii=False), encoding="utf8")
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return found


def _renumbered(processor: dict[str, Any] | None, new_ids: dict[int, int]) -> dict[str, Any] | None:
    """What puts special tokens around a text: by a template that lists their ids, or as pairs of token and id."""
    if processor is None:
        return None
    if processor["type"] == "TemplateProcessing":
        tokens = processor["special_tokens"].items()
        return processor | {
            "special_tokens": {name: use | {"ids": [new_ids[old] for old in use["ids"]]} for name, use in tokens}
        }
    pairs = {key: processor[key] for key in ("sep", "cls") if key in processor}
    return processor | {key: [token, new_ids[old]] for key, (token, old) in pairs.items()}
