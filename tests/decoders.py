"""Tiny real decoders with a byte-level tokenizer, made in a moment."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import sentences, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from raydistil.config import CorpusConfig, TokensConfig
from raydistil.corpus import open_corpus
from raydistil.manifest import Manifest
from raydistil.models import load_tokenizer
from raydistil.specs import SourceSpec
from raydistil.tokens import TokenStore, build_store

BOS, EOS = "<s>", "<|endoftext|>"  # EOS as GPT-2 and Qwen2 have it


@cache
def tokenizer(with_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte pairs of the made sentences; `with_bos`: texts begin with a token of their own, else none has one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    made.train_from_iterator((row["text"] for row in sentences(240)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, **({"bos_token": BOS} if with_bos else {}))


def shape(family: str) -> PreTrainedConfig:
    """Four layers without dropout; keys and values of Llama's kin are half as wide as queries."""
    number = {"vocab_size": len(tokenizer()), "bos_token_id": None, "eos_token_id": tokenizer().eos_token_id}
    if family == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(**number, **drops, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8, "sliding_window": None,
    }  # fmt: skip
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return kinds[family](**number, **sizes)


def model(family: str, spread: float, seed: int = 0) -> PreTrainedModel:
    """Random weights, none of them 0; the larger `spread`, the farther from even its distributions are."""
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(shape(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += spread * torch.randn_like(parameter)
    return made


def write_model(path: Path, family: str, with_bos: bool = False, spread: float = 0.15) -> str:
    """A tiny decoder in hub layout."""
    model(family, spread).save_pretrained(path)
    tokenizer(with_bos).save_pretrained(path)
    return str(path)


def write_store(corpus: Path, teacher: str, length: int = 32) -> Path:
    """The token store of the documents of a file."""
    opened = open_corpus(CorpusConfig(source=str(corpus)), "blocks")
    return build_store(opened, load_tokenizer(teacher), TokensConfig(length=length), "documents")


def source(folder: Path, teacher: str, size: int = 8, length: int = 32, epochs: int = 2) -> SourceSpec:
    """Micro-batches of `size` blocks of made documents."""
    store = write_store(write_jsonl(folder / "corpus.jsonl", sentences(480)), teacher, length)
    return SourceSpec(store, "train", Manifest(TokenStore(store).bucket_rows("train"), epochs, size, seed=3), None)
