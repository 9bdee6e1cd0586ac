"""Pairs of texts: read, joined as their tokenizer joins them, told apart by the model, augmented, exported."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import MINILM, ONE_THREAD, WORDS, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from made import write_teacher
from onnxruntime import InferenceSession
from rows import complaint, read
from test_augment import CLS, COUNTS, MASK, NOTHING, PAD, SEP, changed
from test_augment import batch as single_rows
from test_pipeline import TRAIN, quiet
from transformers import pipeline as transformers_pipeline

from raydistil import pipeline
from raydistil.augment import Words
from raydistil.config import Config, CorpusConfig, TokensConfig, config_of
from raydistil.config.targets import AugmentConfig
from raydistil.corpus import docs_content, open_corpus
from raydistil.errors import ConfigError
from raydistil.export.usage import PAIR
from raydistil.heads import Inputs
from raydistil.manifest import Manifest
from raydistil.models import HeadedEncoder, load_tokenizer
from raydistil.packing import longest_first
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec
from raydistil.tokens import TokenStore, build_store
from raydistil.types import IGNORE, TextRow, TokenBatch

JOINT = 2  # separators between two texts of RoBERTa; BERT has one


def related(count: int) -> list[dict[str, Any]]:
    """Of one kind or not? Neither text says it alone. Every tenth pair has no label."""
    rows, kinds = [], sorted(WORDS)
    for n in range(count):
        first, second = kinds[n % 3], kinds[(n + (n // 3) % 2 * (1 + n % 2)) % 3]
        label = None if n % 10 == 9 else ("same" if first == second else "other")
        premise, hypothesis = f"item{n} has {WORDS[first][n % 8]}", f"there is {WORDS[second][n * 5 % 8]} near it"
        rows.append({"premise": premise, "hypothesis": hypothesis, "label": label})
    return rows


# ---- reading


def test_pairs_are_known_by_their_columns_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", related(6))
    corpus = open_corpus(CorpusConfig(source=str(path)), "classes")
    assert corpus.pairs
    assert corpus.notes[0] == (
        "pairs guessed: 'premise' with 'hypothesis' (corpus.text_column names the only text)"
    )  # fmt: skip
    assert [(row.text, row.pair) for row in corpus.rows()] == [
        (row["premise"], row["hypothesis"]) for row in related(6)
    ]  # fmt: skip
    alone = open_corpus(CorpusConfig(source=str(path), text_column="premise"), "classes")
    assert not alone.pairs and alone.fingerprint != corpus.fingerprint
    assert not open_corpus(CorpusConfig(source=str(path), text_column="premise"), "blocks").pairs


def test_a_second_column_goes_with_the_first(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "more": f"b {n}", "score": n / 2} for n in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = read(path, "numbers", pair_column="more")
    assert [(row.text, row.pair, row.label) for row in found] == [(f"a {n}", f"b {n}", repr(n / 2)) for n in range(4)]
    rows[2]["more"] = 5
    write_jsonl(path, rows)
    assert "rows.jsonl:3: expected text in column 'more', got int" in complaint(path, "numbers", pair_column="more")
    assert "expected the pair column 'less'" in complaint(path, "numbers", pair_column="less")


def test_pairs_are_of_texts_with_one_label() -> None:
    with pytest.raises(ConfigError, match=r"corpus\.pair_column is of task classification or regression"):
        config_of(
            {
                "name": "x", "task": "mlm", "corpus": {"source": "python-docs", "pair_column": "rest"},
                "teacher": {"model": MINILM}, "student": {"num_layers": 2},
            }
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"corpus\.pair_column: expected rest of python-docs, got 'context'"):
        open_corpus(CorpusConfig(source="python-docs", pair_column="context"), "classes")


def test_docstrings_are_paired_with_their_own_rest_and_anothers() -> None:
    rows = [
        TextRow(f"Summary of function {n}.\n\nWhat follows on it {n}.", f"lib{n % 2}", f"m:{n}", "train")
        for n in range(8)
    ]
    made = list(docs_content.pairs([*rows, TextRow("Too short.\n\nNo.", "lib0", "m:9", "train")]))
    assert Counter(row.label for row in made) == {"same": 8, "other": 8}
    number = {row.source: n for n, row in enumerate(rows)}
    for row in made:
        assert row.pair is not None
        own, other = number[row.source], int(row.pair[-2])
        assert row.text == f"Summary of function {own}."
        assert (own == other) == (row.label == "same") and own % 2 == other % 2
    alone = docs_content.pairs([TextRow("The summary of this one.\n\nAnd what follows on it.", "lib", "m", "test")])
    assert [row.label for row in alone] == ["same"]


# ---- tokens


@given(st.integers(1, 40), st.integers(1, 40), st.integers(6, 40))
def test_the_longer_text_is_cut_first(first: int, second: int, length: int) -> None:
    """As tokenizers do it."""
    kept = longest_first(first, second, length - 3)
    assert sum(kept) == min(first + second, length - 3)
    words = [" ".join([word] * count) for word, count in zip(tiny.WORDS, (first, second), strict=False)]
    tokenizer = tiny.tokenizer()
    ids = tokenizer(*words, truncation="longest_first", max_length=length)["input_ids"]
    assert kept == (ids.count(5), ids.count(6))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    """Micro-batches of 8 pairs, in the tokens of MiniLM."""
    path = write_jsonl(tmp_path_factory.mktemp("pairs") / "rows.jsonl", related(60))
    corpus = open_corpus(CorpusConfig(source=str(path), test_share=0), "classes")
    store = build_store(corpus, load_tokenizer(MINILM), TokensConfig(length=20, buckets=(16,)), "classes")
    return SourceSpec(store, "train", Manifest(TokenStore(store).bucket_rows("train"), 1, 8, 0), None)


def test_rows_are_what_the_tokenizer_makes_of_both_texts(spec: SourceSpec) -> None:
    tokenizer, store = load_tokenizer(MINILM), TokenStore(spec.store)
    assert store.meta.pairs and store.meta.joint == (tokenizer.sep_token_id,)
    assert store.meta.labels == ("other", "same")
    asked = {
        tuple(given["input_ids"]): given["token_type_ids"].index(1)
        for row in related(60)
        for given in [tokenizer(row["premise"], row["hypothesis"], truncation=True, max_length=20)]
    }
    made = [MicroBatches(spec).make(index) for index in range(spec.manifest.num_micro_batches)]
    for batch in made:
        assert batch.contexts_B is not None and batch.contexts_B.dtype == np.int32
        for ids, length, start in zip(batch.input_ids_BL, batch.lengths_B, batch.contexts_B, strict=True):
            assert asked[tuple(ids[:length].tolist())] == start


def test_a_text_alone_has_no_second_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"item {n}", "label": n % 2} for n in range(9)])
    corpus = open_corpus(CorpusConfig(source=str(path), test_share=0, validation_share=0), "classes")
    store = build_store(corpus, load_tokenizer(MINILM), TokensConfig(length=16), "classes")
    made = MicroBatches(SourceSpec(store, "train", Manifest((9,), 1, 4, 0), None)).make(0)
    assert made.contexts_B is None and not TokenStore(store).meta.pairs


# ---- the model


def test_the_model_is_told_which_token_is_whose() -> None:
    model = tiny.model(tiny.FAMILIES["bert"], "classification")
    encoder = HeadedEncoder(model, "classification", "float32").frozen()
    ids_BL, mask_BL = tiny.ids(3, 9)
    starts_B = torch.tensor([4, 9, 2])  # the second row has a single text
    said = encoder(Inputs(ids_BL, mask_BL, contexts_B=starts_B))[1]
    types_BL = ((torch.arange(9)[None] >= starts_B[:, None]) & mask_BL).long()
    expected = model(input_ids=ids_BL, attention_mask=mask_BL, token_type_ids=types_BL).logits
    torch.testing.assert_close(said, expected)
    alone = model(input_ids=ids_BL[1:2], attention_mask=mask_BL[1:2]).logits
    torch.testing.assert_close(said[1:2] if said is not None else None, alone)


# ---- augmented


def pairs(lengths: list[tuple[int, int]], joint: int = 1, width: int = 24) -> TokenBatch:
    """Row b holds the tokens 4 + 40 b ... in its first text, 24 + 40 b ... in its second one."""
    ids, starts = np.full((len(lengths), width), PAD, np.int32), []
    for row, (first, second) in enumerate(lengths):
        texts = [*range(4 + 40 * row, 4 + 40 * row + first)], [*range(24 + 40 * row, 24 + 40 * row + second)]
        whole = [CLS, *texts[0], *[SEP] * joint, *texts[1], SEP]
        ids[row, : len(whole)] = whole
        starts.append(1 + first + joint)
    reals = np.array([first + second + joint + 2 for first, second in lengths], np.int32)
    one = single_rows([2] * len(lengths), width)
    return replace(one, input_ids_BL=ids, lengths_B=reals, contexts_B=np.array(starts, np.int32))


def texts_of(made: TokenBatch, joint: int = 1) -> list[tuple[list[int], list[int]]]:
    assert made.contexts_B is not None
    rows = zip(made.input_ids_BL, made.lengths_B, made.contexts_B, strict=True)
    return [(ids[1 : start - joint].tolist(), ids[start : length - 1].tolist()) for ids, length, start in rows]


def varied(given_batch: TokenBatch, config: AugmentConfig, seed: int, joint: int = 1) -> TokenBatch:
    words = Words(PAD, MASK, COUNTS, (PAD, CLS, SEP, MASK), (SEP,) * joint)
    return changed(given_batch, config, seed, words)


LENGTHS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=2)


@given(LENGTHS, st.integers(1, JOINT), st.integers(0, 99))
def test_both_texts_stay_in_their_frame(lengths: list[tuple[int, int]], joint: int, seed: int) -> None:
    config = AugmentConfig(keep=0.2, mask=0.3, replace=0.2, drop=0.3)
    made = varied(pairs(lengths, joint, width=20), config, seed, joint)
    assert made.contexts_B is not None and made.contexts_B.dtype == np.int32
    for ids, length, start in zip(made.input_ids_BL, made.lengths_B, made.contexts_B, strict=True):
        assert ids[0] == CLS and ids[length - 1] == SEP and (ids[start - joint : start] == SEP).all()
        assert (ids[length:] == PAD).all()
        assert (ids[: length - 1] == SEP).sum() == joint


def test_a_kept_pair_is_as_it_was() -> None:
    given_batch = pairs([(3, 5), (6, 2)], JOINT)
    made = varied(given_batch, AugmentConfig(keep=1), 0, JOINT)
    assert np.array_equal(made.input_ids_BL, given_batch.input_ids_BL)
    assert made.contexts_B is not None and made.contexts_B.tolist() == [6, 9]
    assert made.labels_B is not None and (made.labels_B != IGNORE).all()


@pytest.mark.parametrize("token", [SEP, MASK])
def test_a_first_text_may_end_with_what_stands_between_texts(token: int) -> None:
    """Or with another special token, as unknown words are."""
    given_batch = pairs([(3, 5), (6, 2)])
    given_batch.input_ids_BL[0, 3] = token
    made = varied(given_batch, AugmentConfig(**NOTHING | {"join": 1}), 0)
    own = texts_of(given_batch)
    assert texts_of(made) == [(own[0][0], own[1][1]), (own[1][0], own[0][1])]


def test_a_joined_pair_has_anothers_second_text() -> None:
    made = varied(pairs([(3, 5), (6, 2)]), AugmentConfig(**NOTHING | {"join": 1}), 0)
    own = texts_of(pairs([(3, 5), (6, 2)]))
    assert texts_of(made) == [(own[0][0], own[1][1]), (own[1][0], own[0][1])]
    assert made.labels_B is not None and (made.labels_B == IGNORE).all()


def test_what_does_not_fit_is_cut_of_the_longer_text() -> None:
    made = varied(pairs([(9, 1), (2, 9)], width=14), AugmentConfig(**NOTHING | {"join": 1}), 0)
    assert [(len(first), len(second)) for first, second in texts_of(made)] == [(5, 6), (2, 1)]


def test_each_text_of_a_cut_pair_is_a_part_of_itself() -> None:
    before = pairs([(8, 8), (8, 8)])
    made = varied(before, AugmentConfig(**NOTHING | {"cut": 1}), 1)
    for own, cut in zip(texts_of(before), texts_of(made), strict=True):
        for whole, part in zip(own, cut, strict=True):
            at = whole.index(part[0])
            assert whole[at : at + len(part)] == part and len(part) < len(whole)


# ---- a run


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pairs")
    training = {**TRAIN, "epochs": 6, "general": {"epochs": 0}}
    config = config_of(
        {
            "name": "tiny", "output_dir": str(folder), "task": "classification",
            "corpus": {"source": str(write_jsonl(folder / "rows.jsonl", related(300))), "test_share": 0.3},
            "tokens": {"length": 32}, "teacher": {"model": write_teacher(folder / "teacher", "classification")},
            "student": {"layers": [0, 1]}, "cluster": ONE_THREAD, "finetune": {**TRAIN, "epochs": 30},
            "distill": training, "evaluate": {"latency_rounds": 3, "latency_length": 16},
        }
    )  # fmt: skip
    report = pipeline.run_all(config, quiet)
    return config, report, pipeline.export_run(config.run_dir, ("hf", "onnx"), True, quiet)


@pytest.mark.slow
def test_a_student_learns_what_neither_text_says_alone(run: Any) -> None:
    _, report, _ = run
    assert report["teacher_score"] > 0.8 and report["student_score"] > 0.7


@pytest.mark.slow
def test_its_file_takes_both_texts_and_others_can_use_it(run: Any) -> None:
    _, _, exported = run
    folder = Path(exported["student_dir"])
    session = InferenceSession(str(folder / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    made = {each["format"]: each for each in exported["artefacts"]}
    assert made["onnx"]["difference"] <= 1e-4 and made["onnx"]["score"] == made["hf"]["score"]
    said = transformers_pipeline("text-classification", str(folder))
    rows = [row for row in related(40) if row["label"]]
    right = [
        said({"text": row["premise"], "text_pair": row["hypothesis"]})["label"] == row["label"] for row in rows
    ]  # fmt: skip
    assert np.mean(right) > 0.7
    card = (folder / "README.md").read_text()
    assert f"print(model({PAIR}))" in card and "2 classes of pairs of texts" in card
