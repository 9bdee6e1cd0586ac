"""Texts with a number: read, stored, sent, learned from and scored; what only classes have is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, sentences, write_jsonl
from fastapi.testclient import TestClient
from kept import filled, teacher_of
from parity import Streamed, check, one_micro_batch
from reference import Rows
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from raydistil import pipeline
from raydistil.check import check as check_config
from raydistil.config import Config, CorpusConfig, TokensConfig, config_of
from raydistil.config.loss import LossConfig
from raydistil.config.student import StudentConfig
from raydistil.config.targets import AugmentConfig, TargetsConfig
from raydistil.corpus import open_corpus
from raydistil.ensemble import mixed, mixed_targets
from raydistil.errors import ConfigError, DataError, ModelError, PlanError
from raydistil.manifest import Manifest
from raydistil.models import load_model, load_tokenizer
from raydistil.prepare import check_models, check_store, describe_store, make_store
from raydistil.serve.app import build_api
from raydistil.serve.model import load
from raydistil.serve.offer import offered
from raydistil.serve.served import Replicas, Wishes
from raydistil.serve.source import find
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec
from raydistil.student import build_student
from raydistil.tables import show_report
from raydistil.teacher import Teacher
from raydistil.tokens import TokenStore, build_store
from raydistil.types import Content, Mixture, TeacherTargets, TextRow, TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")

MSE: dict[str, Any] = {"divergence": "mse", "cosine": 0}
TRAIN = {"micro_batch_size": 8, "lr": 3e-3}
MIDDLES = {"fruit": -1.0, "metal": 2.0, "river": 5.0}


def numbered(count: int) -> list[dict[str, Any]]:
    """The texts of `sentences` with a number: by their kind and their length; every tenth has none."""
    rows = []
    for number, row in enumerate(sentences(count)):
        score = MIDDLES[row["label"]] + 0.1 * len(row["text"].split())
        rows.append({"text": row["text"], "score": None if number % 10 == 9 else score})
    return rows


@pytest.fixture(scope="module")
def numbers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("numbers") / "numbers.jsonl", numbered(240))


@pytest.fixture(scope="module")
def guesser(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny teacher with a random head for one number."""
    path = tmp_path_factory.mktemp("guesser")
    torch.manual_seed(1)
    model = load_model(tiny_teacher, "regression")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    load_tokenizer(tiny_teacher).save_pretrained(path)
    return str(path)


def source_of(file: Path, teacher: str) -> SourceSpec:
    corpus = open_corpus(CorpusConfig(source=str(file)), "numbers")
    store = build_store(corpus, load_tokenizer(teacher), TokensConfig(length=48, buckets=(16, 32)), "numbers")
    return SourceSpec(store, "train", Manifest(TokenStore(store).bucket_rows("train"), 1, 8, seed=3), None)


def config_for(folder: Path, teacher: str, corpus: Path | str = "rows.jsonl", /, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "tiny", "output_dir": str(folder), "task": "regression",
        "corpus": {"source": str(corpus), "test_share": 0.3}, "tokens": {"length": 32, "buckets": [16]},
        "teacher": {"model": teacher}, "student": {"layers": [0, 2]}, "cluster": ONE_THREAD,
        "distill": {**TRAIN, "epochs": 2, "general": {"epochs": 1}},
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    }  # fmt: skip
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return config_of(tree)


# ---- the corpus


def read(path: Path, **keys: Any) -> list[TextRow]:
    return list(open_corpus(CorpusConfig(source=str(path), **keys), "numbers").rows())


def test_labels_are_numbers_or_missing(tmp_path: Path) -> None:
    """-1 and -100 are numbers like any other."""
    path, table = tmp_path / "x.jsonl", tmp_path / "x.csv"
    values = [3, 0.25, -1, -100, "1e3", None, ""]
    path.write_text("".join(json.dumps({"text": "t", "score": value}) + "\n" for value in values))
    table.write_text("text,score\n" + "".join(f"t,{'' if value is None else value}\n" for value in values))
    for source in (path, table):
        assert [row.label for row in read(source)] == ["3.0", "0.25", "-1.0", "-100.0", "1000.0", None, None]


@pytest.mark.parametrize("value", ['"good"', '"nan"', "NaN", "-Infinity", "1e39", "true", "[1.0]", "1" * 400])
def test_what_is_no_finite_number_is_named_by_file_and_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"text": "one", "label": 1}}\n{{"text": "two", "label": {value}}}\n')
    with pytest.raises(DataError) as told:
        read(path)
    assert str(told.value).startswith(f"{path}:2: expected a finite number in column 'label', or null, got ")
    assert len(str(told.value).splitlines()) == 1


def test_the_installed_libraries_have_no_numbers() -> None:
    with pytest.raises(ConfigError, match="python-docs has classes and no numbers"):
        open_corpus(CorpusConfig(source="python-docs"), "numbers")


def test_a_test_split_whose_numbers_are_withheld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in GLUE's STS-B, where all of them are -1: the validation split is scored in its place."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub_cache"))
    for split, values in (("train", [0.5, -1.0]), ("validation", [4.5, -1.0]), ("test", [-1.0, -1.0])):
        rows = [{"text": f"{split} {n}", "label": value} for n, value in enumerate(values)]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)  # type: ignore[arg-type]
    corpus = open_corpus(CorpusConfig(source=str(tmp_path)), "numbers")
    found = {split: [row.label for row in corpus.rows() if row.split == split] for split in ("train", "test")}
    assert found == {"train": ["0.5", "-1.0"], "test": ["4.5", "-1.0"]}
    assert any("validation split is scored" in note for note in corpus.notes)


# ---- the store and the wire


def test_the_store_keeps_numbers_and_nan_where_there_is_none(numbers_file: Path, guesser: str) -> None:
    rows = {row["text"]: row["score"] for row in numbered(240)}
    tokenizer, store = load_tokenizer(guesser), TokenStore(source_of(numbers_file, guesser).store)
    for bucket, (count, labelled) in enumerate(
        zip(store.bucket_rows("train"), store.bucket_rows("train", True), strict=True)
    ):
        ids, lengths, labels = store.read("train", bucket, np.arange(count))
        assert labels.dtype == np.float32
        texts = [tokenizer.decode(row[1 : end - 1].tolist()) for row, end in zip(ids, lengths, strict=True)]
        expected = [math.nan if rows[text] is None else rows[text] for text in texts]
        assert np.array_equal(labels, np.array(expected, np.float32), equal_nan=True)
        assert np.isnan(labels[labelled:]).all() and not np.isnan(labels[:labelled]).any()
    numbers = [score for score in rows.values() if score is not None]
    low, high = store.meta.splits["train"].numbers or (0, 0)
    assert min(numbers) <= low < high <= max(numbers)
    assert f"numbers: {low:g} to {high:g} in the training split" in describe_store(store)
    assert any("without a label" in line for line in describe_store(store))


def test_the_same_file_has_another_store_for_classes(tmp_path: Path, guesser: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"{n} apples", "label": str(n % 3)} for n in range(30)])
    kinds: tuple[Content, ...] = ("classes", "numbers")
    config, tokenizer = CorpusConfig(source=str(path)), load_tokenizer(guesser)
    classes, numbers = (
        TokenStore(build_store(open_corpus(config, kind), tokenizer, TokensConfig(), kind)) for kind in kinds
    )
    assert classes.path != numbers.path
    assert (classes.meta.labels, numbers.meta.labels) == (("0", "1", "2"), ())


def test_a_changed_text_loses_its_number(numbers_file: Path, guesser: str) -> None:
    source = source_of(numbers_file, guesser)
    plain = MicroBatches(source).make(0)
    made = MicroBatches(replace(source, augment=AugmentConfig(keep=0.5))).make(0)
    assert plain.labels_B is not None and made.labels_B is not None
    same_B = (plain.input_ids_BL == made.input_ids_BL).all(1)
    assert 0 < same_B.sum() < len(same_B)
    assert made.labels_B.dtype == np.float32
    assert np.array_equal(made.labels_B, np.where(same_B, plain.labels_B, np.nan).astype(np.float32), equal_nan=True)


def test_the_teachers_number_is_kept_bit_for_bit(numbers_file: Path, guesser: str, tmp_path: Path) -> None:
    teacher = teacher_of(guesser, "regression", (4,), True, LossConfig(**MSE))
    source = filled(replace(source_of(numbers_file, guesser), variants=1), teacher, tmp_path)
    maker, sent = MicroBatches(source), Teacher(teacher)
    for index in (0, 5, source.manifest.num_micro_batches - 1):
        row, wanted = maker.taught(index), sent.targets(maker.make(index))
        for name in ("states", "soft_labels"):
            assert row[f"{name}_0"][0].as_py() == wanted[name]


def test_several_teachers_have_one_mean_number() -> None:
    said = [TeacherTargets({}, torch.tensor([[1000.25], [-3.0]])), TeacherTargets({}, torch.tensor([[2000.5], [5.0]]))]
    mixture = mixed_targets(said, [0.25, 0.75], LossConfig(**MSE)).soft_labels
    assert isinstance(mixture, Mixture)
    assert torch.equal(mixed(mixture), torch.tensor([[1750.4375], [3.0]]))


# ---- the loss


def numbers_said(student: PreTrainedModel, case: Streamed) -> Tensor:
    """[B], one row at a time and without padding."""
    made = case.made
    rows = zip(made.input_ids_BL.astype("int64"), made.lengths_B.tolist(), strict=True)
    return torch.stack([student(input_ids=torch.from_numpy(ids[None, :length])).logits[0, 0] for ids, length in rows])


@pytest.mark.parametrize("codec", ["hidden", "logits"])
def test_streamed_numbers_train_as_the_formula_says(numbers_file: Path, guesser: str, codec: str) -> None:
    source, loss = source_of(numbers_file, guesser), LossConfig(kd=3, task=0.5, hidden={"weight": 0.0}, **MSE)
    case = one_micro_batch("regression", guesser, source, TargetsConfig(codec=codec), True, loss, ray=False)
    assert isinstance(case.given.soft_labels, Tensor) and case.made.labels_B is not None
    taught = torch.stack([case.teacher()(input_ids=ids).logits[0, 0] for ids in _real_ids(case.made)])
    torch.testing.assert_close(case.given.soft_labels[:, 0], taught)
    labels = torch.from_numpy(case.made.labels_B.copy())
    has = ~labels.isnan()

    def expected(student: PreTrainedModel, rows: Rows) -> Tensor:
        said = numbers_said(student, case)
        soft = sum((s - t) ** 2 for s, t in zip(said, case.given.soft_labels[:, 0], strict=True)) / len(said)
        hard = sum((s - y) ** 2 for s, y in zip(said[has], labels[has], strict=True)) / has.sum()
        return 3 * soft + 0.5 * hard

    assert has.any() and not has.all()
    check(case, loss, expected)


def _real_ids(batch: TokenBatch) -> list[Tensor]:
    rows = zip(batch.input_ids_BL.astype("int64"), batch.lengths_B.tolist(), strict=True)
    return [torch.from_numpy(ids[None, :length]) for ids, length in rows]


# ---- the student


@pytest.mark.parametrize(
    "student", [{"layers": (0, 2)}, {"family": "distilbert", "layers": (1, 3)}, {"ffn_size": 32, "narrow": "svd"}]
)
def test_every_kind_of_student_says_one_number(guesser: str, student: dict[str, Any], tmp_path: Path) -> None:
    build_student(load_model(guesser, "regression"), StudentConfig(**student), "regression").save_pretrained(tmp_path)
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert (made.config.num_labels, made.config.problem_type) == (1, "regression")
    assert made(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 1)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distill": {"loss": {"divergence": "forward_kl"}}}, "distill.loss.divergence: expected mse for task regress"),
        ({"distill": {"loss": {"label_smoothing": 0.1}}}, "distill.loss.label_smoothing is of classes: leave it out"),
        ({"distill": {"loss": {"triplet": {}}}}, "distill.loss.triplet is of classes: leave it out"),
        ({"distill": {"loss": {"contrastive": {}}}}, "distill.loss.contrastive is of classes: leave it out"),
        (
            {"distill": {"targets": {"codec": "topk"}}},
            "distill.targets.codec: expected hidden or logits for task regression, got topk",
        ),
        (
            {"distill": {"targets": {"codec": "sampled"}, "loss": {"divergence": "forward_kl"}}},
            "distill.targets.codec: expected hidden or logits for task regression, got sampled",
        ),
        ({"corpus": {"max_rows_per_label": 5}}, "corpus.max_rows_per_label is of texts' classes: use corpus.max_rows"),
    ],
)
def test_what_only_classes_have_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as told:
        config_for(tmp_path, "teacher", **changes)
    assert expected in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def test_the_recipe_compares_numbers_as_they_are(tmp_path: Path) -> None:
    config = config_for(tmp_path, "teacher", distill={})
    assert config.distill is not None and config.distill.loss.hidden is not None
    assert (config.distill.loss.divergence, config.distill.epochs) == ("mse", 2)
    assert (config.student.start, config.distill.augment is not None) == ("checkpoint", True)


def test_a_teacher_of_classes_knows_no_number(tiny_classifier: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a teacher that gives one number for task regression, got one of 3"):
        check_models(config_for(tmp_path, tiny_classifier))


def test_numbers_that_cannot_be_ranked_or_are_not_there(tmp_path: Path, guesser: str) -> None:
    same, none = (tmp_path / name for name in ("same.jsonl", "none.jsonl"))
    write_jsonl(same, [{"text": f"item {n}", "score": 3.0} for n in range(30)])  # type: ignore[dict-item]
    config = config_for(tmp_path, guesser, same)
    with pytest.raises(DataError, match="expected different labels in the test split to rank predictions by, all are"):
        check_store(config, TokenStore(make_store(config)))
    write_jsonl(none, [{"text": f"item {n}", "score": None} for n in range(30)])  # type: ignore[dict-item]
    config = config_for(tmp_path, guesser, none, finetune=TRAIN, evaluate=None)
    with pytest.raises(DataError, match="expected labelled training rows, found none"):
        check_store(config, TokenStore(make_store(config)))


def test_a_number_is_served_as_it_is(guesser: str) -> None:
    source = find(Path(guesser))
    assert source.task == "regression"
    client = TestClient(build_api(load(source)), raise_server_exceptions=False)
    text, pair = "item 1 is iron and tin", {"text": "item 0 is apple", "text_pair": "item 2 is nile"}
    reply = client.post("/v1/score", json={"inputs": [text, pair]})
    assert reply.status_code == 200, reply.text
    tokenizer, model = AutoTokenizer.from_pretrained(guesser), load_model(guesser, "regression").eval()
    with torch.inference_mode():
        expected = [
            model(**tokenizer(*texts, return_tensors="pt")).logits.item() for texts in ((text,), tuple(pair.values()))
        ]
    assert [each["score"] for each in reply.json()["results"]] == pytest.approx(expected, abs=1e-5)
    assert "POST /v1/score" in client.post("/v1/classify", json={"inputs": text}).json()["error"]["message"]
    for wish in ({"shadow": 0.5}, {"canary": guesser}):
        with pytest.raises(PlanError, match="gives numbers: leave shadow and canary out"):
            offered(Wishes(guesser, Replicas(1, 1), **wish))


# ---- the whole chain


def test_check_shows_numbers_and_one_output(numbers_file: Path, tiny_teacher: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("")
    config = config_for(tmp_path, tiny_teacher, numbers_file, finetune=TRAIN)
    changes = {"distill": {"targets": {"cache": str(tmp_path)}, "augment": {"keep": 1.0}, "general": {"epochs": 0}}}
    tree = {**config.model_dump(mode="json", exclude_unset=True), **changes}
    overrides = [f"{key}={_inline(value)}" for key, value in tree.items()]
    found = check_config(tmp_path / "c.toml", overrides, show=2)
    assert [example["label"] for example in found["examples"]] == [str(row["score"]) for row in numbered(2)]
    pooler, tables = 32 * 32 + 32, (30522 + 64 + 2) * 32 + 2 * 32
    layer = 4 * (32 * 32 + 32) + 2 * 32 + 2 * 32 * 64 + 64 + 32 + 2 * 32
    assert found["models"]["student"]["parameters"] == tables + 2 * layer + pooler + 32 + 1
    (kept,) = [line for line in found["plan"] if line.startswith("targets:")]
    assert "rows x 44" in kept  # 40 of its own and a float32


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


@pytest.mark.slow
def test_from_the_fine_tuning_to_the_table(
    ray_cluster: None, tiny_teacher: str, numbers_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(
        tmp_path, tiny_teacher, numbers_file, finetune={**TRAIN, "epochs": 20}, distill={"epochs": 6},
        ensemble=[{"model": tiny_teacher}], evaluate={"no_teacher_baseline": True},
    )  # fmt: skip
    report = pipeline.run_all(config, lambda line: None)
    assert report["metric"] == "Spearman"
    assert report["teacher_score"] > 0.9 and report["student_score"] > 0.8
    assert report["retention"] == report["student_score"] / report["teacher_score"]
    names = [model["name"] for model in report["models"]]
    assert names == ["teacher", "student", "no_teacher"]
    assert all(report[f"{name}_pearson"] > 0.8 and 0 < report[f"{name}_rmse"] < 2 for name in names)
    show_report(report)
    table = capsys.readouterr().out
    rows = report["models"][0]["score"]["rows"]
    assert f"Spearman on {rows} test items" in table
    assert all(heading in table for heading in ("Pearson", "RMSE", "retention", "95 % interval"))
    card = (Path(report["student_dir"]) / "README.md").read_text()
    assert f"Score: Spearman on {rows} test items. Pearson of the same: teacher {report['teacher_pearson']:.4f}" in card
    _loads_with_transformers_alone(report)
    assert find(config.run_dir).task == "regression"


def _loads_with_transformers_alone(report: dict[str, Any]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(report["student_dir"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(report["student_dir"])
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
    texts = ["item 0 is apple and pear", "item 1 is iron and tin", "item 2 is nile and elbe"]
    said = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert said == sorted(said)
