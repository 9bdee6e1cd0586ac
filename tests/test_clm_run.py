"""Causal language models end to end, and what is refused before anything starts."""

import json
import math
from pathlib import Path
from typing import Any

import decoders
import pytest
import tiny
from conftest import ONE_THREAD
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config

from raydistil import pipeline
from raydistil.config import Config, load_config
from raydistil.errors import ConfigError, ModelError, StorageError
from raydistil.prepare import check_models, make_store
from raydistil.serve.source import find
from raydistil.tokens import TokenStore

TRAIN = {"micro_batch_size": 8, "lr": 3e-3}


def config_for(folder: Path, teacher: str, corpus: Path | str = "rows.txt", /, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(folder),
        "task": "clm",
        "corpus": {"source": str(corpus), "test_share": 0.3},
        "tokens": {"length": 32},
        "teacher": {"model": teacher},
        "student": {"layers": [0, 2]},
        "cluster": ONE_THREAD,
        "distill": {**TRAIN, "epochs": 6},
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return Config.model_validate(tree)


def quiet(line: str) -> None:
    """Takes what the run says and keeps none of it."""


# ---- the whole chain


def check_report(config: Config, report: dict[str, Any]) -> None:
    assert report["metric"] == "next-token accuracy"
    names = ["teacher", "student", "untrained"] + ["no_teacher"] * config.evaluate.no_teacher_baseline
    assert [model["name"] for model in report["models"]] == names
    assert max(report["teacher_clm_loss"], report["student_clm_loss"]) < report["untrained_clm_loss"]
    assert report["student_score"] > report["untrained_score"]
    for name in names:
        assert report[f"{name}_perplexity"] == math.exp(report[f"{name}_clm_loss"])
    counts = TokenStore(make_store(config)).meta.splits["test"]
    labels = report["models"][0]["score"]["rows"]
    assert 0 < labels < counts.tokens - counts.texts + counts.rows  # a label a token but for each document's last
    assert labels >= counts.tokens - counts.texts - counts.rows
    card = (Path(report["student_dir"]) / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert f"teacher {report['teacher_perplexity']:.2f}, student {report['student_perplexity']:.2f}" in card


@pytest.mark.slow
def test_gpt2_from_its_fine_tuning_to_text(ray_cluster: None, corpus_file: Path, tmp_path: Path) -> None:
    """The student writes what it has read, with transformers alone and the teacher's own ways of generating."""
    teacher = decoders.write_model(tmp_path / "teacher", "gpt2", spread=0.0)
    GenerationConfig(eos_token_id=decoders.tokenizer().eos_token_id, max_new_tokens=7).save_pretrained(teacher)
    config = config_for(tmp_path, teacher, corpus_file, finetune={**TRAIN, "epochs": 15}, distill={"epochs": 6})
    report = pipeline.run_all(config, quiet)
    check_report(config, report)
    model = AutoModelForCausalLM.from_pretrained(report["student_dir"])
    tokenizer = AutoTokenizer.from_pretrained(report["student_dir"])
    prompt = tokenizer("item 12 is iron and", return_tensors="pt")
    written = model.generate(**prompt, do_sample=False)
    assert 0 < written.shape[1] - prompt["input_ids"].shape[1] <= 7
    assert tokenizer.decode(written[0]).startswith("item 12 is iron and ")
    with pytest.raises(StorageError, match="got the causal language model GPT2LMHeadModel: there is no route") as told:
        find(config.run_dir)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.slow
def test_llama_and_its_baseline_through_draws(ray_cluster: None, corpus_file: Path, tmp_path: Path) -> None:
    teacher = decoders.write_model(tmp_path / "teacher", "llama", with_bos=True, spread=0.0)
    config = config_for(
        tmp_path, teacher, corpus_file, finetune={**TRAIN, "epochs": 20}, evaluate={"no_teacher_baseline": True},
        distill={"loss": {"cosine": 0, "kd_positions": "all"}, "targets": {"codec": "sampled"}},
    )  # fmt: skip
    check_report(config, pipeline.run_all(config, quiet))


@pytest.mark.slow
def test_qwen2_through_its_relations(ray_cluster: None, corpus_file: Path, tmp_path: Path) -> None:
    teacher = decoders.write_model(tmp_path / "teacher", "qwen2", spread=0.0)
    config = config_for(
        tmp_path, teacher, corpus_file, finetune={**TRAIN, "epochs": 20},
        distill={"loss": {"cosine": 0, "minilm": {"relation_heads": 4}, "hidden": {}}, "targets": {"codec": "topk"}},
    )  # fmt: skip
    check_report(config, pipeline.run_all(config, quiet))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"masking": {"share": 0.3}}, "masking is of task mlm: leave [masking] out for task clm"),
        (
            {"export": {"to": ["hf", "onnx"]}},
            "export.to: expected some of bf16, fp8-torchao, hf, int8-torchao for task clm, got hf, onnx",
        ),
        ({"corpus": {"labelled_share": 0.5}}, "corpus.labelled_share is of labelled texts: leave"),
        ({"distill": {"loss": {"pkd": {}}}}, "got pkd: leave it out"),
        ({"distill": {"loss": {"attention": {}}}}, "got attention: leave it out"),
        ({"distill": {"loss": {"triplet": {}}}}, "got triplet: leave it out"),
        ({"distill": {"loss": {"minilm": {"version": 1}}}}, "got minilm version 1: leave it out"),
    ],
)
def test_settings_of_other_tasks(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    tree = config_for(tmp_path, "teacher").model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value}
    (tmp_path / "c.toml").write_text("")
    overrides = [f"{key}={value}" for key, value in toml_values(tree)]
    with pytest.raises(ConfigError) as told:
        load_config(tmp_path / "c.toml", overrides)
    assert expected in str(told.value)
    assert len(str(told.value).splitlines()) == 1


def toml_values(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Every section as an inline table, as `--set` takes it."""
    return [(key, inline(value)) for key, value in tree.items()]


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def test_a_loss_that_weighs_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    config = config_for(tmp_path, "teacher", distill={"loss": {"pkd": {"weight": 0.0}}})
    assert config.distill is not None and config.distill.loss.pkd is not None


def complaint(kind: type[Exception], config: Config) -> str:
    with pytest.raises(kind) as told:
        check_models(config)
    assert len(str(told.value).splitlines()) == 1
    return str(told.value)


def test_encoders_are_no_teachers_of_what_follows(tmp_path: Path) -> None:
    encoder = str(tiny.write_model(tmp_path / "bert", "mlm"))
    expected = "teacher.model: expected one of gpt2, llama, mistral, qwen2, qwen3 for task clm, got bert"
    assert expected in complaint(ModelError, config_for(tmp_path, encoder, finetune=TRAIN))


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    teacher = decoders.write_model(tmp_path / "model", "gpt2")
    settings = Path(teacher) / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": None}))
    assert "expected a tokenizer with an eos token for task clm" in complaint(ModelError, config_for(tmp_path, teacher))


def test_more_tokens_than_positions_or_than_the_window(tmp_path: Path) -> None:
    teacher = decoders.write_model(tmp_path / "model", "qwen2")
    said = complaint(ConfigError, config_for(tmp_path, teacher, tokens={"length": 65}))
    assert said == "tokens.length: expected at most the teacher's 64 positions, got 65: lower it"
    shape = decoders.shape("qwen2").to_dict()
    shape |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "layer_types": None}
    Qwen2Config(**shape | {"architectures": ["Qwen2ForCausalLM"]}).save_pretrained(teacher)
    said = complaint(ConfigError, config_for(tmp_path, teacher))
    assert said == "tokens.length: expected at most the teacher's attention window of 16 for task clm, got 32: lower it"


def test_relations_that_cut_no_key_in_equal_parts(tmp_path: Path) -> None:
    teacher = decoders.write_model(tmp_path / "model", "llama")
    fitting = config_for(tmp_path, teacher, distill={"loss": {"minilm": {"relation_heads": 16}}})
    check_models(fitting)
    said = complaint(ConfigError, config_for(tmp_path, teacher, distill={"loss": {"minilm": {"relation_heads": 32}}}))
    assert said.endswith("expected a divisor of 16, 32, got 32: choose another")


def test_the_shipped_recipe_is_the_published_one() -> None:
    config = load_config(Path(__file__).parents[1] / "jobs" / "distilgpt2.toml", [])
    assert config.distill is not None
    loss = config.distill.loss
    assert (loss.kd, loss.temperature, loss.task, loss.cosine, loss.kd_positions) == (5, 2, 2, 1, "all")
    assert (config.task, config.student.layers) == ("clm", (0, 2, 4, 7, 9, 11))
