"""Tiny real tokenizers and models, made in a millisecond."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    ElectraConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)

from raydistil.models import LOADERS
from raydistil.types import Task

LABELS = ("argparse", "json", "re")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
WORDS = tuple(f"{first}{second}" for first in "abcdefgh" for second in "aeiou")
SHAPE = {
    "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SHAPE),
    "roberta": RobertaConfig(**SHAPE),
    "mpnet": MPNetConfig(**SHAPE),
    "electra": ElectraConfig(**SHAPE, embedding_size=8),
}


def tokenizer(words: tuple[str, ...] = WORDS) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer that knows `words`: the n-th has the id 5 + n."""
    return BertTokenizer(vocab={word: number for number, word in enumerate((*SPECIAL, *words))})


def model(config: PreTrainedConfig, task: Task, seed: int = 0) -> PreTrainedModel:
    """Random weights, all of them different from 0 and from each other's layer."""
    torch.manual_seed(seed)
    made: PreTrainedModel = LOADERS[task].from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def ids(rows: int = 2, length: int = 9, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of made texts; every row after the first has some padding."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL = torch.randint(len(SPECIAL), SHAPE["vocab_size"], (rows, length), generator=generator)
    mask_BL = torch.ones(rows, length, dtype=torch.bool)
    mask_BL[1:, length - 3 :] = False
    return ids_BL, mask_BL


def write_model(path: Path, task: Task, family: str = "bert", seed: int = 0) -> Path:
    """A tiny model in hub layout."""
    config = FAMILIES[family].from_dict(FAMILIES[family].to_dict())
    if task == "classification":
        config.id2label = dict(enumerate(LABELS))
        config.label2id = {label: number for number, label in enumerate(LABELS)}
    if task == "regression":
        config.num_labels = 1
    model(config, task, seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
