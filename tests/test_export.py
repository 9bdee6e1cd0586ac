"""The model card."""

from typing import Any

import pytest

from raydistil.config import Config
from raydistil.export import model_card

BASE: dict[str, Any] = {"task": "mlm", "corpus": {"source": "rows.txt"}, "teacher": {"model": "big"}}


def test_a_student_that_was_not_scored_says_so() -> None:
    config = Config.model_validate(BASE | {"student": {"num_layers": 2}})
    for report in ({}, {"wall_s": 12.0}):
        assert model_card(config, report).endswith("Not evaluated.\n")


@pytest.mark.parametrize(
    ("student", "start"),
    [
        ({"layers": [0, 2]}, "layers [0, 2] of it"),
        ({"num_layers": 6, "rule": "last"}, "6 layers (last) of it"),
        ({"ffn_size": 8, "narrow": "svd"}, "all layers of it, cut to feed-forward size 8 (svd)"),
        (
            {"layers": [1], "hidden_size": 16, "num_heads": 2},
            "layers [1] of it, cut to hidden size 16, heads 2 (importance)",
        ),
        ({"model": "small"}, "small"),
    ],
)
def test_the_card_says_where_the_student_comes_from(student: dict[str, Any], start: str) -> None:
    card = model_card(Config.model_validate(BASE | {"student": student}), {})
    expected = f"A student of `big`, started from {start} and distilled on `rows.txt` with raydistil (seed 0).\n"
    assert expected in card
