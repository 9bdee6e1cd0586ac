"""Bad input ends with exit code 2 and one line that says what was expected, what came and what to do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import sentences, write_jsonl

from raydistil.cli import _guarded

CONFIG = """
name = "cli"
output_dir = {runs}
task = "classification"
[corpus]
source = {corpus}
test_share = 0.3
[tokens]
length = 32
[teacher]
model = {teacher}
[student]
layers = [0, 2]
[finetune]
epochs = 2
micro_batch_size = 8
[distill]
epochs = 40
micro_batch_size = 8
[evaluate]
latency_rounds = 3
latency_length = 16
"""


def write_config(folder: Path, teacher: str, corpus: Path) -> Path:
    path = folder / "run.toml"
    values = {"runs": str(folder / "runs"), "corpus": str(corpus), "teacher": teacher}
    path.write_text(CONFIG.format(**{key: json.dumps(value) for key, value in values.items()}))
    return path


def without(config: Path, section: str) -> Path:
    """A copy of `config` that lacks `section`."""
    path = config.with_name(f"without-{section}.toml")
    path.write_text(re.sub(rf"\[{section}\][^\[]*", "", config.read_text()))
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_teacher: str, corpus_file: Path) -> Path:
    return write_config(tmp_path, tiny_teacher, corpus_file)


def complaint(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a command that must fail with exit code 2 leaves on stderr."""
    assert _guarded(list(arguments)) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.epochz=3", "unknown key distill.epochz: did you mean distill.epochs?"),
        ("distill.epochs=many", "distill.epochs"),
        ("distill.epochs=0", "distill.epochs"),
        ("corpus.source=nowhere.jsonl", "found nothing at nowhere.jsonl"),
        ("teacher.model=./nowhere", "found none at ./nowhere"),
        ("teacher.model=package:no_such_package/model", "no_such_package is not installed"),
        ("student.layers=[0, 4]", "expected distinct layers from 0 to 3"),
        ("student.layers=[0, 0]", "expected distinct layers"),
        ("tokens.length=4096", "expected at most the teacher's 64 positions, got 4096"),
        ("cluster.students=1000", "1000 students x 1"),
        ("cluster.teacher_gpus=1", "GPUs"),
        ("student.hidden_size=20", "student.hidden_size: expected a multiple of the teacher's head size 8, got 20"),
        ("student.num_heads=2", "student.num_heads: expected heads of at most the teacher's size 8, got 32 / 2"),
        ("student.ffn_size=65", "student.ffn_size: expected at most the teacher's 64, got 65"),
        ("evaluate.latency_length=65", "evaluate.latency_length: expected at most the teacher's 64 positions, got 65"),
        ("nonsense", "--set expects section.key=value"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_wrong_value_is_named(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: Path, command: str, override: str,
    expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever ran before: as a command finds it
    assert expected in complaint(capfd, command, str(config), "--set", override)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the corpus is empty"),
        (b'{"text": "a", "label": "x"}\n{"txt": "b", "label": "y"}\n', "bad.jsonl:2: expected the text column 'text'"),
        (b'{"text": "a", "label": "x"}\n{"text": "\xff", "label": "y"}\n', "bad.jsonl:2: expected UTF-8 text"),
        (b'{"text": "a", "label": "x"}\nnot json\n', "bad.jsonl:2: expected one JSON object a line"),
        (b'{"words": "a"}\n', "bad.jsonl:1: expected a text column"),
        (b'{"text": "a", "label": null}\n', "expected at least two classes, found no label"),
    ],
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_bad_data_is_named_by_file_and_row(
    capfd: pytest.CaptureFixture[str], config: Path, tmp_path: Path, command: str, content: bytes, expected: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert expected in complaint(capfd, command, str(config), "--set", f"corpus.source={path}")


def test_a_student_with_another_vocabulary_is_refused(
    capfd: pytest.CaptureFixture[str], config: Path, tiny_teacher: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    other = tmp_path / "other"
    AutoModelForMaskedLM.from_pretrained(tiny_teacher).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.add_tokens(["onemoretoken"])
    tokenizer.save_pretrained(other)
    overrides = ["--set", "student.layers=[]", "--set", f"student.model={other}"]
    assert "expected one vocabulary, got 30522 tokens" in complaint(capfd, "check", str(config), *overrides)


def test_a_student_that_is_not_there_is_not_called_a_teacher(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    for model in ("./nowhere", "package:no_such_package/model"):
        overrides = ["--set", "student.layers=[]", "--set", f"student.model={model}"]
        assert complaint(capfd, "check", str(config), *overrides).startswith("error: student.model: ")


def test_a_rule_chooses_no_more_layers_than_there_are(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    overrides = ["--set", "student.layers=[]", "--set", "student.num_layers=3", "--set", "student.rule=every_other"]
    expected = "student.num_layers: expected at most 2 for rule every_other of a teacher with 4 layers, got 3: lower it"
    assert expected in complaint(capfd, "check", str(config), *overrides)


def test_check_says_how_large_the_models_are(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    assert (
        _guarded(["check", str(config), "--json", "--set", "student.ffn_size=32", "--set", "student.layers=[0]"]) == 0
    )
    models = json.loads(capfd.readouterr().out)["models"]
    tables = (30522 + 64 + 2) * 32 + 2 * 32
    attention, pooler = 4 * (32 * 32 + 32) + 2 * 32, 32 * 32 + 32
    layers = {name: count * (attention + 2 * 32 * ffn + ffn + 32 + 2 * 32)
              for name, count, ffn in (("teacher", 4, 64), ("student", 1, 32))}  # fmt: skip
    for name, parameters in layers.items():
        assert models[name]["parameters"] == tables + parameters + pooler + 3 * 32 + 3
        assert models[name]["bytes"] == 4 * models[name]["parameters"]
        assert models[name]["length"] == 32
    assert _guarded(["check", str(config), "--show", "0"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^teacher: 1\.0 M parameters \(1\.0 M embeddings\), 4 MiB, ", out, re.MULTILINE)
    assert re.search(r"^student: 1\.0 M parameters", out, re.MULTILINE)
    assert "steps here" not in out
    assert _guarded(["check", str(config), "--show", "0", "--probe"]) == 0
    assert re.search(r"^\d+ steps here: a teacher \d", capfd.readouterr().out, re.MULTILINE)


def test_unknown_commands_and_missing_files(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "No such command" in complaint(capfd, "distil")
    assert "expected a TOML file, found none" in complaint(capfd, "run", str(tmp_path / "none.toml"))


def test_the_version_is_the_package_s(capfd: pytest.CaptureFixture[str]) -> None:
    assert _guarded(["--version"]) == 0
    assert capfd.readouterr().out == f"raydistil {version('raydistil')}\n"


def test_a_teacher_without_the_head_is_refused_unless_it_is_taught(
    capfd: pytest.CaptureFixture[str], config: Path
) -> None:
    message = complaint(capfd, "check", str(without(config, "finetune")))
    assert "expected a teacher with a head for task classification, got BertForMaskedLM: add [finetune]" in message


def test_a_stage_the_configuration_says_nothing_of(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    message = complaint(capfd, "evaluate", str(without(config, "evaluate")))
    assert "expected a section [evaluate] to run that stage, found none" in message


def test_a_labelled_share_is_of_classes(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    overrides = ["--set", "task=mlm", "--set", "corpus.labelled_share=0.5"]
    assert "corpus.labelled_share is of labelled texts" in complaint(capfd, "check", str(config), *overrides)


def test_check_names_a_head_that_does_not_fit_the_data(
    capfd: pytest.CaptureFixture[str], config: Path, tiny_classifier: str, tmp_path: Path
) -> None:
    two = write_jsonl(tmp_path / "two.jsonl", [row for row in sentences(90) if row["label"] != "fruit"])
    said = "teacher.model: its head has 3 outputs, the data {}: a new one is made".format
    for corpus, expected in ((two, [said(2)]), (write_jsonl(tmp_path / "three.jsonl", sentences(90)), [])):
        chosen = ["--set", f"teacher.model={tiny_classifier}", "--set", f"corpus.source={corpus}"]
        assert _guarded(["check", str(config), "--json", *chosen]) == 0
        checked = json.loads(capfd.readouterr().out)
        assert [line for line in checked["data"] if "head" in line] == expected


def test_a_teacher_of_other_classes_is_refused_before_its_vocabulary_is_cut(
    capfd: pytest.CaptureFixture[str], config: Path, tiny_classifier: str, tmp_path: Path
) -> None:
    """The cut one has a head of the data's classes, which says nothing of the teacher's."""
    other = write_jsonl(tmp_path / "other.jsonl", [{**row, "label": f"not {row['label']}"} for row in sentences(90)])
    changes = f"teacher.model={tiny_classifier}", f"corpus.source={other}", "student.vocabulary=corpus"
    chosen = [part for change in changes for part in ("--set", change)]
    said = complaint(capfd, "run", str(without(config, "finetune")), *chosen)
    assert "expected a teacher of the classes not fruit, not metal, not river, in this order, got fruit" in said


def test_a_teacher_that_knows_its_classes_needs_no_labels(
    capfd: pytest.CaptureFixture[str], config: Path, tiny_classifier: str, tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in sentences(90)])
    chosen = ["--set", f"teacher.model={tiny_classifier}", "--set", f"corpus.source={texts}"]
    taught = without(without(config, "finetune"), "evaluate")
    assert _guarded(["check", str(taught), "--json", *chosen]) == 0
    assert "no label column: the teacher alone labels the texts" in json.loads(capfd.readouterr().out)["data"][1]
    assert "expected a label column" in complaint(capfd, "check", str(config), *chosen)


def test_check_and_doctor_print_one_json_object(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    for arguments in (["check", str(config), "--json"], ["doctor", "--json"]):
        assert _guarded(arguments) == 0
        assert isinstance(json.loads(capfd.readouterr().out), dict)


def test_check_shows_where_values_come_from(capfd: pytest.CaptureFixture[str], config: Path) -> None:
    assert _guarded(["check", str(config), "--json", "--set", "seed=7"]) == 0
    rows = {row["key"]: row for row in json.loads(capfd.readouterr().out)["config"]}
    assert rows["seed"] == {"key": "seed", "value": 7, "origin": "--set"}
    assert rows["distill.epochs"]["origin"] == "file"
    assert rows["distill.lr"]["origin"] == "recipe"
    assert rows["distill.accumulation"]["origin"] == "default"


def _start(config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from raydistil.cli import main; main()", "run", str(config), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _session_members(leader: int) -> list[int]:
    """Living processes of the session a command started with."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(leader):
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if os.getsid(int(entry.name)) == leader and state != "Z":
                    members.append(int(entry.name))
            except (ProcessLookupError, FileNotFoundError):
                continue
    return members


@pytest.mark.long
def test_ctrl_c_stops_after_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path, tiny_teacher: str) -> None:
    config = write_config(tmp_path, tiny_teacher, write_jsonl(tmp_path / "items.jsonl", sentences(240)))
    asked = ("--json", "--set", "distill.general.epochs=0", "--set", "distill.epochs=15")
    process = _start(config, *asked)
    metrics = tmp_path / "runs" / "cli" / "metrics.jsonl"
    while '"distill"' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted: distill stopped after step")
    assert _session_members(process.pid) == []
    again = _start(config, *asked)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    report = json.loads(out)
    assert {"teacher_score", "student_score", "retention", "speedup", "wall_s", "student_dir"} <= report.keys()
    distill = report["stages"]["distill"]
    assert 0 < distill["micro_batches"] < distill["steps"]
