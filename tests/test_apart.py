"""A backend in a process of its own says what it says here, and its end is noticed."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from raydistil.errors import ModelError
from raydistil.serve.apart import Apart, _portable, choose_apart
from raydistil.serve.backends import Best, Row
from raydistil.serve.choice import Chosen, choose
from raydistil.serve.served import ONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("apart") / "model", "mlm")


@pytest.fixture(scope="module")
def there(folder: Path) -> Iterator[Chosen]:
    chosen = choose_apart(str(folder), "mlm", (), ONE, "torch")
    yield chosen
    assert isinstance(chosen.backend, Apart)
    chosen.backend.close()
    assert chosen.backend._process.returncode == 0


def rows() -> list[Row]:
    ids = np.arange(5, 5 + 12, dtype=np.int32)
    return [
        Row(ids, places=np.array([2, 3])),
        Row(ids[:5], places=np.array([1]), best=4),
        Row(ids[:9], places=np.array([0])),
    ]


def test_it_says_there_what_it_says_here(folder: Path, there: Chosen) -> None:
    here = choose(str(folder), "mlm", (), ONE, "torch")
    assert there.backend.name == "torch" and list(there.rows_s) == ["torch"] and there.left_out == {}
    for _ in range(3):
        for own, other in zip(here.backend.run(rows()), there.backend.run(rows()), strict=True):
            if isinstance(own, Best):
                assert isinstance(other, Best) and np.array_equal(own.ids_MK, other.ids_MK)
                np.testing.assert_allclose(own.scores_MK, other.scores_MK, rtol=1e-6)
            else:
                assert not isinstance(other, Best) and own.dtype == other.dtype == np.float32
                np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


def test_an_error_there_is_an_error_here_and_the_next_batch_is_answered(there: Chosen) -> None:
    with pytest.raises(IndexError):
        there.backend.run([Row(np.array([10**6], np.int32), places=np.array([0]))])
    assert len(there.backend.run(rows())) == 3


def test_what_cannot_be_served_is_told_as_in_one_process(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"int8: expected onnx/model_int8.onnx in .*, found none: run raydistil export"
    ):
        choose_apart(str(folder), "mlm", (), ONE, "int8")


def test_a_process_that_has_ended_is_noticed(folder: Path) -> None:
    backend: Any = choose_apart(str(folder), "mlm", (), ONE, "torch").backend
    backend._process.kill()
    backend.wait()
    for _ in range(2):
        with pytest.raises(ModelError, match="expected the model's process to answer, it ended with -9"):
            backend.run(rows())


def test_an_error_that_cannot_be_sent_is_told() -> None:
    class Odd(Exception):
        pass

    assert str(_portable(Odd("why"))) == "Odd: why"
    assert pickle.loads(pickle.dumps(_portable(MemoryError("much")))).args == ("much",)
