"""What is to be served, found by what the user said; and the file that says it to Serve."""

import itertools
import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from pydantic import TypeAdapter
from ray.serve.schema import ServeDeploySchema

from raydistil.errors import PlanError, StorageError
from raydistil.serve import run as running
from raydistil.serve.canary import Limits
from raydistil.serve.keys import add_key
from raydistil.serve.offer import offered, teacher_of
from raydistil.serve.run import _kept, config_file
from raydistil.serve.served import Cascade, Replicas, Served, Wishes
from raydistil.serve.source import version_of

CASCADE = Cascade(0.5, 1.5, 0.1, 0.9, 0.88)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a teacher that was tuned by it."""
    folder = tmp_path_factory.mktemp("offer") / "run"
    tiny.write_model(folder / "student", "classification")
    tiny.write_model(folder / "teacher", "classification", seed=1)
    return folder


def test_a_student_alone_has_nobody_beside(run: Path) -> None:
    served = offered(Wishes(str(run)))
    assert served.beside.sources() == {} and served.source.directory == str(run / "student")


@pytest.mark.parametrize("wishes", [{"shadow": 0.1}, {"cascade": CASCADE}])
def test_the_teacher_is_the_runs_own(run: Path, wishes: dict[str, object]) -> None:
    served = offered(TypeAdapter(Wishes).validate_python({"run_dir": str(run), **wishes}))
    assert list(served.beside.sources()) == ["teacher"]
    assert served.beside.teacher is not None and served.beside.teacher.directory == str(run / "teacher")


def test_a_teacher_that_was_not_tuned_is_the_one_of_the_configuration(run: Path, tmp_path: Path) -> None:
    teacher = str(run / "teacher")
    kept = {"hash": "00", "config": {"teacher": {"model": teacher}}}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert teacher_of(tmp_path) == run / "teacher"


def test_a_models_directory_has_no_teacher(run: Path) -> None:
    with pytest.raises(StorageError, match=r"which names its teacher, got .*student: say where it is with --teacher"):
        offered(Wishes(str(run / "student"), shadow=0.5))
    served = offered(Wishes(str(run / "student"), shadow=0.5, teacher=str(run / "teacher")))
    assert list(served.beside.sources()) == ["teacher"]


def test_a_canary_runs_as_the_student_does_and_has_its_limits(run: Path) -> None:
    limits = Limits(0.02, 0.3)
    served = offered(
        Wishes(str(run), backend="torch", canary=str(run / "teacher"), canary_share=0.4, limits=limits)
    )  # fmt: skip
    canary = served.beside.canary
    assert canary is not None and (canary.share, canary.limits, canary.source.backend) == (0.4, limits, "torch")
    assert served.without_canary().beside.sources() == {}


def test_one_that_answers_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "mlm", "mlm")
    with pytest.raises(PlanError, match=r"expected a canary for classification like the student, .* is one for mlm"):
        offered(Wishes(str(run), canary=str(tmp_path / "mlm")))
    other = Path(shutil.copytree(run / "student", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["id2label"]["0"] = "another"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError, match=r"expected a teacher with the student's labels \['argparse', 'json', 're'\]"):
        offered(Wishes(str(run), shadow=0.1, teacher=str(other)))
    with pytest.raises(StorageError, match="expected the directory of a run or a model, found none"):
        offered(Wishes(str(run), canary=str(tmp_path / "nowhere")))


def test_vectors_of_another_length_are_compared_with_none(tmp_path: Path) -> None:
    for name in ("student", "wide"):
        tiny.write_model(tmp_path / name, "embedding")
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"pooling": "mean"}
        config["hidden_size"] *= 1 if name == "student" else 2
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for wishes in ({"shadow": 0.1, "teacher": str(tmp_path / "wide")}, {"canary": str(tmp_path / "wide")}):
        with pytest.raises(PlanError, match=r"with vectors of 16 numbers like the student's, .*wide gives 32"):
            offered(TypeAdapter(Wishes).validate_python({"run_dir": str(tmp_path / "student"), **wishes}))


def test_a_cascade_is_for_classes(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "mlm", "mlm")
    with pytest.raises(PlanError, match="expected a student of classification for a cascade"):
        offered(Wishes(str(tmp_path / "mlm"), cascade=CASCADE, teacher=str(tmp_path / "mlm")))


def test_the_file_for_serve_says_all_of_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.txt"
    add_key(keys, "ada", 5.0)
    wishes = Wishes(
        str(run), Replicas(0, 3, 5.0), "torch", str(keys), str(run / "teacher"), 0.2, CASCADE, str(run / "teacher"),
        0.3, Limits(0.02, 0.3),
    )  # fmt: skip
    monkeypatch.chdir(run.parent)
    text = config_file(TypeAdapter(Wishes).validate_python({**_plain(wishes), "run_dir": "run"}), "127.0.0.1", 8123)
    (app,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert TypeAdapter(Wishes).validate_python(app.args) == wishes
    assert yaml.safe_load(text)["http_options"] == {"host": "127.0.0.1", "port": 8123}
    assert "ada" not in text  # keys stay in their file


def test_a_file_for_what_is_not_there_is_not_written(run: Path) -> None:
    with pytest.raises(StorageError, match=r"expected API keys at nowhere.txt"):
        config_file(Wishes(str(run), keys="nowhere.txt"), "127.0.0.1", 8123)


def _plain(wishes: Wishes) -> dict[str, object]:
    found: dict[str, object] = TypeAdapter(Wishes).dump_python(wishes)
    return found


def test_what_is_served_is_kept_whatever_is_exported_there(run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    with ExitStack() as copies:
        served = _kept(offered(Wishes(str(own))), copies, pytest.fail)
        kept = Path(served.source.kept or "")
        shutil.rmtree(own / "student")
        assert version_of(kept) == served.source.version and kept.parent.parent == own
    assert not kept.exists() and list(own.iterdir()) == [own / "teacher"]


def test_where_no_copy_can_be_the_student_is_read_where_it_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(beside: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(running, "scratch_directory", nowhere)
    served, said = offered(Wishes(str(run))), list[str]()
    with ExitStack() as copies:
        assert _kept(served, copies, said.append) == served
    assert len(said) == 1 and "Permission denied" in said[0]


def test_a_student_that_changes_while_it_is_copied_is_not_served(run: Path) -> None:
    served = offered(Wishes(str(run)))
    other = replace(served, source=replace(served.source, version="0" * 64))
    with ExitStack() as copies, pytest.raises(StorageError, match="it changed: start again"):
        _kept(other, copies, pytest.fail)
    assert not list(run.glob(".student.*"))


def test_what_is_being_written_is_not_looked_at_yet(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file that comes late is not overlooked."""
    own = Path(shutil.copytree(run, tmp_path / "run"))
    files = [own / "student" / name for name in ("model.safetensors", "tokenizer.json")]
    swaps, looks = list[int](), itertools.count()

    def sleep(_: float) -> None:
        look = next(looks)
        if look in (1, 2):  # one after the other
            files[look - 1].write_bytes(files[look - 1].read_bytes())
        elif look == 5:
            files[0].rename(own / "away")
        elif look == 6:
            (own / "away").rename(files[0])
        elif look == 9:
            raise KeyboardInterrupt

    def swapped(_: Path, served: Served, *__: object) -> Served:
        swaps.append(next(looks))
        return served

    monkeypatch.setattr(running.time, "sleep", sleep)
    monkeypatch.setattr(running, "_swapped", swapped)
    running._watch(own, offered(Wishes(str(own))), ExitStack(), pytest.fail)
    assert swaps == [4]
