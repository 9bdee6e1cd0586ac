"""The model card: what the hub reads of it, and what people do."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from raydistil import pipeline, rundir
from raydistil.config import Config, config_of, result_hash
from raydistil.config.loss import LossConfig
from raydistil.errors import ConfigError
from raydistil.export.card import Facts, Trained, hub_name, loss_line, model_card
from raydistil.tokens import SplitCounts, StoreMeta
from raydistil.types import Score

BASE: dict[str, Any] = {
    "task": "mlm", "corpus": {"source": "rows.txt"}, "teacher": {"model": "big"}, "student": {"num_layers": 2},
}  # fmt: skip
ADDRESS = "https://example.org/license"
COUNTS = SplitCounts(texts=12, rows=9, tokens=1234, truncated=2, too_short=1, too_unknown=2)


def facts(report: dict[str, Any] | None = None, notes: tuple[str, ...] = (), **changes: Any) -> Facts:
    data = StoreMeta(50, 0, 4, (), ("a", "b"), {"train": COUNTS}, notes, "classes")
    return Facts(Config.model_validate(BASE | changes), data, (0, 5), (), report or {})


def scored(name: str, value: float, **figures: float) -> dict[str, Any]:
    score = {"metric": "masked accuracy", "value": value, "low": value - 0.1, "high": value + 0.1, "rows": 100}
    return {
        "name": name, "parameters": 2000, "size_bytes": 8000, "flops_per_token": 3e6, "score": score,
        "latency_p50_ms": None, **figures,
    }  # fmt: skip


def front(card: str) -> dict[str, Any]:
    """What the hub reads."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    return found


# ---- for the hub


def test_the_hub_reads_what_the_student_reached() -> None:
    models = [scored("teacher", 0.5, mlm_loss=2.5), scored("student", 0.4, mlm_loss=3.25)]
    card = model_card(facts({"models": models, "retention": 0.8, "speedup": 2.0}), "me/small")
    (index,) = front(card)["model-index"]
    assert index["name"] == "me/small"
    (result,) = index["results"]
    assert result["task"]["type"] == front(card)["pipeline_tag"] == "fill-mask"
    assert result["dataset"] == {"name": "rows.txt", "type": "rows.txt", "split": "test"}
    found = {(metric["type"], metric["name"]): metric["value"] for metric in result["metrics"]}
    assert found == {("accuracy", "Masked accuracy"): 0.4, ("loss", "Cross-entropy at the masks (nats)"): 3.25}
    assert front(card)["metrics"] == ["accuracy", "loss"]


def test_what_is_at_the_hub_is_named_there() -> None:
    here = front(model_card(facts()))
    assert "base_model" in here and "datasets" not in here and "license" not in here
    wiki = {"source": "wikimedia/wikipedia", "hub_config": "20231101.en"}
    data = front(model_card(facts(corpus=wiki, teacher={"model": "google/big"})))
    assert (data["base_model"], data["datasets"]) == ("google/big", "wikimedia/wikipedia")
    own = front(model_card(facts(student={"model": "google/small"}, teacher={"model": "google/big"})))
    assert own["base_model"] == "google/small"


@pytest.mark.parametrize("model", ["package:name/model", "./big", "/data/big", "~/big", "tests"])
def test_what_is_elsewhere_has_no_name_at_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert hub_name(model) is None
    assert "base_model" not in front(model_card(facts(teacher={"model": model})))


def test_a_license_that_the_hub_knows_and_one_that_it_does_not() -> None:
    known = front(model_card(facts(distill={}, export={"license": "Apache-2.0"})))
    assert known["license"] == "apache-2.0" and "license_name" not in known
    own = front(model_card(facts(distill={}, export={"license": "house-1.0", "license_link": ADDRESS})))
    assert (own["license"], own["license_name"], own["license_link"]) == ("other", "house-1.0", ADDRESS)
    for broken in ({"license_link": ADDRESS}, {"license": "other"}):
        with pytest.raises(ConfigError, match="set license to its name"):
            config_of(BASE | {"distill": {}, "export": broken})


# ---- for people


def test_a_student_that_was_not_scored_says_so() -> None:
    for report in ({}, {"wall_s": 12.0}):
        card = model_card(facts(report))
        assert "Not evaluated.\n" in card
        assert "model-index" not in front(card) and "metrics" not in front(card)


@pytest.mark.parametrize(
    ("student", "start"),
    [
        ({"layers": [0, 5]}, "layers 0, 5 (counted from 0) of it"),
        (
            {"ffn_size": 8, "narrow": "svd"},
            "layers 0, 5 (counted from 0) of it, cut to feed-forward size 8 (svd)",
        ),
        (
            {"layers": [0, 5], "hidden_size": 16, "num_heads": 2},
            "layers 0, 5 (counted from 0) of it, cut to hidden size 16, heads 2 (importance)",
        ),
        ({"model": "small"}, "`small`"),
    ],
)
def test_the_card_says_where_the_student_comes_from(student: dict[str, Any], start: str) -> None:
    expected = f"A student of `big`, started from {start} and distilled on `rows.txt` with raydistil."
    assert expected in model_card(facts(student=student))


def test_an_assistant_is_where_the_layers_are_from() -> None:
    card = model_card(facts(distill={}, assistants=[{"num_layers": 4}]))
    assert "of the assistant before it and distilled" in card


def test_paths_of_the_machine_stay_on_it() -> None:
    notes = ("bad rows left out: 1 of at most 2", "/secret/rows.txt:3: no text", "a guess (corpus.text_column)")
    paths = {"corpus": {"source": "/secret/rows.txt"}, "teacher": {"model": "/secret/big"}}
    card = model_card(facts(notes=notes, **paths))
    assert "secret" not in card and "`rows.txt`" in card and "`big`" in card
    assert "- bad rows left out: 1 of at most 2\n" in card and "guess" not in card


def test_what_was_left_out_is_counted() -> None:
    assert "| train | 12 | 9 |  | 1,234 | 2 | 3 |" in model_card(facts())


def test_a_loss_is_written_as_a_sum() -> None:
    loss = LossConfig.model_validate({"kd": 5, "task": 0, "hidden": {}, "schedule": {"kd": {"linear": (1, 0)}}})
    assert loss_line(loss) == "5 kd (forward_kl, temperature 2) (scheduled) + 1 cosine + 1 hidden"
    assert loss_line(LossConfig(kd=1, divergence="mse", task=0, cosine=0)) == "1 kd (mse)"


def test_texts_a_step_are_what_was_trained_on() -> None:
    """In a run that went on, the newest part alone is timed; its steps and rows are the whole."""
    summary = {"rows": 90, "steps": 30, "tokens": 5000, "wall_s": 90.0, "saving_s": 1.26}
    config = Config.model_validate(BASE | {"distill": {"epochs": 10, "lr": 1e-3}}).distill
    assert config is not None
    made = facts()
    card = model_card(Facts(made.config, made.data, made.layers, (Trained("distill", config, "1 kd", summary),), {}))
    assert "| distill | 1 kd | 10 | 0.001 | 30.0 | 30 | 5,000 | 1.5 | 1.3 |" in card


# ---- of a real run


def test_the_figures_are_those_of_the_report(finished: tuple[Config, dict[str, Any]]) -> None:
    config, report = finished
    card = (config.run_dir / rundir.STUDENT / "README.md").read_text()
    student = next(model for model in report["models"] if model["name"] == "student")
    score = Score(**student["score"])
    assert f"| {score.value:.4f} | {score.low:.4f} to {score.high:.4f} |" in card
    assert f"| student | {student['parameters']:,} |" in card
    assert f"keeps {report['retention']:.1%} of the teacher's score" in card
    done = report["stages"]["distill"]
    assert f"| {done['steps']:,} | {done['tokens']:,} | {done['wall_s'] / 60:.1f} |" in card
    assert f"Configuration `{result_hash(config)}`" in card and report["config_hash"] == result_hash(config)
    assert "started from layers 0, 2 (counted from 0) of it" in card
    assert str(config.output_dir) not in card and "fruit, metal, river" in card
    values = {each["type"]: each["value"] for each in front(card)["model-index"][0]["results"][0]["metrics"]}
    assert values["accuracy"] == pytest.approx(report["student_score"], abs=1e-6)


def test_the_lines_that_load_it_load_it(
    finished: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = finished
    student = config.run_dir / rundir.STUDENT
    (code,) = re.findall(r"```python\n(.*?)```", (student / "README.md").read_text(), re.DOTALL)
    exec(code.replace("path/to/this/directory", str(student)), {})
    assert re.fullmatch(r"\[\{'label': '(fruit|metal|river)', 'score': 0\.\d+\}\]\n", capsys.readouterr().out)


def test_files_of_an_export_before_are_not_claimed(finished: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    config, report = finished
    run_dir = tmp_path / "moved"
    shutil.copytree(config.run_dir, run_dir, ignore=shutil.ignore_patterns(rundir.LOCK, rundir.STUDENT))
    made = {"file": "onnx/model.onnx"}
    rundir.write_json(run_dir / rundir.REPORT, {**report, "artefacts": [made]})
    pipeline.export_run(run_dir, ("hf",), False, lambda line: None)
    assert "onnx" not in (run_dir / rundir.STUDENT / "README.md").read_text()
