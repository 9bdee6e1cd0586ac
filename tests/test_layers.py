"""Which layers are compared with which, and what each side must give for it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil.config.loss import LossConfig
from raydistil.errors import ConfigError
from raydistil.layers import LayerPlan, plan_layers, spread

NOTHING: dict[str, Any] = {"kd": 0, "task": 0, "cosine": 0}


def plan(kind: Any = "classification", head: bool = False, **keys: Any) -> LayerPlan:
    return plan_layers(LossConfig(**NOTHING | keys), kind, head, 12, 4)


def test_layers_spread_as_tinybert_has_them() -> None:
    """12 layers on 4: the n-th with the 3n-th, embeddings with embeddings."""
    assert spread(0, 12, 4) == ((0, 0), (3, 1), (6, 2), (9, 3), (12, 4))
    assert spread(1, 12, 4) == ((3, 1), (6, 2), (9, 3), (12, 4))


@given(st.integers(1, 48), st.data())
def test_a_spread_ends_at_the_last_of_both_and_never_turns_back(teacher: int, data: st.DataObject) -> None:
    student = data.draw(st.integers(1, teacher))
    pairs = spread(0, teacher, student)
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (teacher, student)
    assert [t for t, _ in pairs] == sorted({t for t, _ in pairs})


def test_labels_alone_need_no_states() -> None:
    found = plan(kd=5, task=2)
    assert (found.teacher_states, found.student_states) == ((), ())


def test_the_cosine_needs_the_last_states() -> None:
    found = plan(cosine=1)
    assert (found.last, found.teacher_states, found.student_states) == ((12, 4), (12,), (4,))


def test_a_language_models_student_gives_its_last_state_for_the_head() -> None:
    assert plan("mlm", kd=1).student_states == (4,)
    assert plan("mlm", kd=1).teacher_states == ()
    assert plan("mlm", head=True, kd=1).teacher_states == (12,)


@pytest.mark.parametrize("also", [{"cosine": 1}, {"hidden": {}}, {"pkd": {}}, {"attention": {}}, {"minilm": {}}])
def test_states_for_the_logits_alone(also: dict[str, Any]) -> None:
    """Then those of the compared places will do."""
    assert plan("mlm", head=True, kd=1, task=1).logits_alone
    assert not plan("mlm", head=True, kd=1, **also).logits_alone
    assert not plan("mlm", kd=1).logits_alone  # soft labels travel


def test_hidden_states_are_projected_where_they_are_compared() -> None:
    found = plan(hidden={"layers": ((0, 0), (6, 2))}, pkd={"layers": ((9, 3),)})
    assert found.teacher_states == (0, 6, 9)
    assert found.projected_states == (0, 2, 3)


def test_attention_is_made_of_the_state_before() -> None:
    found = plan(attention={"layers": ((3, 1), (12, 4))}, minilm={"teacher_layer": 10})
    assert found.attention_layers == ((3, 10, 12), (1, 4))
    assert (found.teacher_states, found.student_states) == ((2, 9, 11), (0, 3))
    assert found.projected_states == ()


def test_only_a_guided_triplet_asks_the_teacher() -> None:
    assert plan(triplet={}).teacher_states == ()
    assert plan(triplet={"guided": True}).teacher_states == (12,)
    assert plan(contrastive={}).student_states == (4,)


def test_a_section_without_weight_asks_for_nothing() -> None:
    found = plan(
        kd=1, hidden={"weight": 0}, attention={"weight": 0}, minilm={"weight": 0}, triplet={"weight": 0, "guided": True}
    )
    assert (found.teacher_states, found.student_states) == ((), ())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden": {"layers": ((13, 4),)}}, "distill.loss.hidden: expected layers up to 12 of the teacher and 4 of"),
        ({"attention": {"layers": ((12, 5),)}}, r"distill.loss.attention: .* got \[12, 5\]"),
        ({"minilm": {"teacher_layer": 24}}, r"distill.loss.minilm: .* got \[24, 4\]"),
    ],
)
def test_layers_that_are_not_there(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**keys)
