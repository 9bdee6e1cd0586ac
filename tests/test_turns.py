from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig

from raydistil import turns as module
from raydistil.chain import links
from raydistil.config import config_of
from raydistil.config.cluster import ClusterConfig
from raydistil.specs import Turns
from raydistil.turns import INFERENCE, teachers_work, turns


@given(st.integers(1, 500), st.floats(0, 1))
def test_a_share_of_the_micro_batches_is_the_teachers(number: int, share: float) -> None:
    taken = [Turns(1, 2, share).threads(n) for n in range(number)]
    assert abs(taken.count(1) - share * number) < 1


def test_turns_are_spread_evenly() -> None:
    assert [Turns(1, 4, 0.4).threads(n) for n in range(10)] == [4, 4, 1, 4, 1, 4, 4, 1, 4, 1]
    assert {Turns(1, 4, 1.0).threads(n) for n in range(9)} == {1}


@pytest.mark.parametrize(
    ("cluster", "work", "expected"),
    [
        (ClusterConfig(), 0.5, Turns(4, 8, 0.5)),
        (ClusterConfig(), 3.0, Turns(4, 8, 1.0)),
        (ClusterConfig(students=2), 0.5, Turns(4, 4, 0.5)),
        (ClusterConfig(student_threads=4), 0.5, Turns(4, 4, 1.0)),
        (ClusterConfig(student_gpus=1, teacher_gpus=1), 0.5, Turns(4, 4, 1.0)),
    ],
)
def test_all_cores_are_the_students_where_it_did_not_ask_for_fewer(
    monkeypatch: pytest.MonkeyPatch, cluster: ClusterConfig, work: float, expected: Turns
) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    assert turns(cluster, 4, 4, work) == expected


def test_the_teachers_work_is_their_share_of_the_matrix_products(tiny_teacher: str, tmp_path: Path) -> None:
    config = config_of({
        "name": "r", "task": "mlm", "teacher": {"model": tiny_teacher}, "student": {"layers": [0, 2]},
        "corpus": {"source": "python-docs"}, "tokens": {"length": 16}, "distill": {"epochs": 1},
    })  # fmt: skip
    (link,) = links(config, (tiny_teacher,), tmp_path)
    shape = BertConfig.from_pretrained(tiny_teacher, num_hidden_layers=2)
    shape.save_pretrained(tmp_path / "student")
    width, inner = shape.hidden_size, shape.intermediate_size
    layer = 2 * (4 * width**2 + 2 * width * inner) + 4 * 16 * width
    head = config.masking.share * 2 * (width**2 + width * shape.vocab_size)
    student = 3 * (2 * layer + head)  # a backward pass is two forward ones
    found = teachers_work(config, link, str(tmp_path / "student"), students_head=True)
    assert found == pytest.approx(INFERENCE * 4 * layer / (student + INFERENCE * head))
    two = replace(link, teachers=(tiny_teacher, tiny_teacher))
    found = teachers_work(config, two, str(tmp_path / "student"), students_head=False)
    assert found == pytest.approx(INFERENCE * 2 * (4 * layer + head) / student)
