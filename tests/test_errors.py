"""The error tree: one line each, the same in every process."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistil.errors import ConfigError, DataError, ModelError, PlanError, RaydistilError, StorageError

KINDS = (ConfigError, DataError, ModelError, PlanError, StorageError)


@given(st.sampled_from(KINDS), st.text())
def test_an_error_is_one_line(kind: type[RaydistilError], text: str) -> None:
    assert len(str(kind(text)).splitlines()) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_to_another_process(kind: type[RaydistilError]) -> None:
    back = pickle.loads(pickle.dumps(kind("expected this,\n  got that")))
    assert type(back) is kind
    assert str(back) == "expected this, got that"
