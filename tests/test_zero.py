"""Stages of ZeRO: how the student's state lies on the workers changes nothing of what it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import LANGUAGE_MODEL, TRAIN, config_for, quiet

from raydistil import pipeline, rundir
from raydistil.models import load_model

# Otherwise weights as small as these are left whole.
PIECES = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.mark.slow
def test_weights_in_pieces_learn_what_whole_ones_do(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    """Tied embeddings, whose head the losses use by themselves."""
    shape: dict[str, Any] = {**LANGUAGE_MODEL, "evaluate": None, "cluster": {"students": 2}}
    train = {**TRAIN, "epochs": 2, "dropout": 0.0}
    whole = config_for(tmp_path, tiny_teacher, corpus_file, name="whole", distill=train, **shape)
    parts = {**train, "zero_stage": 3, "deepspeed": PIECES}
    pieces = config_for(tmp_path, tiny_teacher, corpus_file, name="pieces", distill=parts, **shape)
    pipeline.run_all(whole, quiet)
    pipeline.run_all(pieces, quiet)
    before = load_model(str(whole.run_dir / "student_init"), "mlm").state_dict()
    first, second = (load_model(str(c.run_dir / rundir.DISTILLED), "mlm").state_dict() for c in (whole, pieces))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-4)
    words = "bert.embeddings.word_embeddings.weight"
    assert (first[words] - before[words]).abs().max() > 1e-2
