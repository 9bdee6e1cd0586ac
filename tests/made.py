"""Small corpora of words with classes, and of questions with the contexts that answer them."""

from pathlib import Path
from typing import Any

import tiny
from conftest import MINILM, WORDS, write_jsonl

from raydistil.config import CorpusConfig, TokensConfig
from raydistil.corpus import open_corpus
from raydistil.manifest import Manifest
from raydistil.models import load_tokenizer
from raydistil.specs import SourceSpec
from raydistil.tokens import TokenStore, build_store
from raydistil.types import CONTENT, Task

FILLERS = ("is", "near", "the", "and", "with")
SEED = 3


def tagged(count: int) -> list[dict[str, Any]]:
    """Words of a kind between others; two of one kind in a row are one entity. Every tenth row has no classes."""
    rows = []
    for number in range(count):
        words, tags = [f"item{number}"], ["O"]
        for step in range(1 + number % 4):
            kind = sorted(WORDS)[(number + step) % 3]
            pair = [WORDS[kind][(number * 3 + step) % 8], WORDS[kind][(number + 5 * step) % 8]][
                : 1 + (number + step) % 2
            ]
            words += [FILLERS[(number + step) % 5], *pair]
            tags += ["O", *[f"{mark}-{kind}" for mark in "BI"][: len(pair)]]
        rows.append({"tokens": words, "ner_tags": None if number % 10 == 9 else tags})
    return rows


def asked(count: int) -> list[dict[str, Any]]:
    """Which fruit, metal or river? Contexts of several lengths; every tenth question has no known answer."""
    rows = []
    for number in range(count):
        kinds = [sorted(WORDS)[(number + step) % 3] for step in range(3)]
        parts = [f"the {kind} is {WORDS[kind][(number + place) % 8]}" for place, kind in enumerate(kinds)]
        context = f"item {number}: " + " and ".join(["nothing more"] * (number % 5) + parts)
        kind = kinds[number % 3]
        text = WORDS[kind][(number + number % 3) % 8]
        answers = {"text": [text], "answer_start": [context.index(f"{kind} is {text}") + len(kind) + 4]}
        known = None if number % 10 == 9 else answers
        rows.append({"question": f"which {kind} is it?", "context": context, "answers": known})
    return rows


def texts(count: int) -> list[dict[str, str]]:
    """Sentences of several lengths."""
    return [
        {"text": f"item {n}: " + " and ".join(WORDS[k][(n * s) % 8] for s in range(1, 3 + n % 7) for k in WORDS)}
        for n in range(count)
    ]


ROWS = {"token_classification": tagged, "question_answering": asked, "embedding": texts}
HEADS: tuple[Task, ...] = ("token_classification", "question_answering", "embedding")
TAGS = ("B-fruit", "B-metal", "B-river", "I-fruit", "I-metal", "I-river", "O")


def source(folder: Path, task: Task, count: int = 60, length: int = 48) -> SourceSpec:
    """Micro-batches of 8 of them, in the tokens of MiniLM."""
    path = write_jsonl(folder / f"{task}.jsonl", ROWS[task](count))
    corpus = open_corpus(CorpusConfig(source=str(path)), CONTENT[task])
    config = TokensConfig(length=length, buckets=(32,))
    store = build_store(corpus, load_tokenizer(MINILM), config, CONTENT[task])
    return SourceSpec(store, "train", Manifest(TokenStore(store).bucket_rows("train"), 1, 8, SEED), None)


def write_teacher(path: Path, task: Task, seed: int = 0) -> str:
    """A tiny BERT with a random head and MiniLM's tokenizer, in hub layout."""
    tokenizer = load_tokenizer(MINILM)
    shape = tiny.FAMILIES["bert"].from_dict(
        tiny.FAMILIES["bert"].to_dict()
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "num_hidden_layers": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    )
    if task == "token_classification":
        shape.id2label, shape.label2id = dict(enumerate(TAGS)), {tag: n for n, tag in enumerate(TAGS)}
    tiny.model(shape, task, seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
