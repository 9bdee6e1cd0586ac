"""The files by which Sentence Transformers knows how a text's states become its vector."""

import json
from pathlib import Path
from typing import Any

from raydistil.heads import Pooling
from raydistil.types import SENTENCE_LAYOUT

MODULE = "sentence_transformers.models"


def write_layout(folder: Path, pooling: Pooling, width: int, length: int) -> None:
    """Beside a model of vectors of `width`, for texts of at most `length` tokens."""
    chosen = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{MODULE}.{kind}"}
        for number, (path, kind) in enumerate(parts.items())
    ]
    _write(folder / SENTENCE_LAYOUT, {"word_embedding_dimension": width, **chosen})
    _write(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    _write(folder / "modules.json", modules)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
