"""Draws that are a row's own: its masks, sampled places and drawn soft labels take turns over the epochs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sources import mlm_source

from raydistil.config import MaskingConfig
from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.manifest import Manifest
from raydistil.places import compared_places
from raydistil.source import MicroBatches
from raydistil.specs import SourceSpec, TargetsSpec
from raydistil.targets import encode_targets
from raydistil.types import IGNORE, TokenBatch

EPOCHS = 5


@pytest.fixture(scope="module", params=["uniform", "frequency"])
def source(request: pytest.FixtureRequest, tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    made = mlm_source(tmp_path_factory.mktemp("variants"), tiny_teacher, rows=120, epochs=EPOCHS)
    return replace(made, masking=MaskingConfig(kind=request.param), variants=2)


def masked_rows(source: SourceSpec) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(epoch, row) -> (ids the student sees, labels), over the whole run."""
    maker = MicroBatches(source)
    found: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for index in range(source.manifest.num_micro_batches):
        slot, batch = source.manifest.slot(index), maker.make(index)
        assert batch.labels_BL is not None
        for place, row in enumerate(slot.rows.tolist()):
            found[slot.epoch, row] = (batch.input_ids_BL[place].tolist(), batch.labels_BL[place].tolist())
    return found


def test_a_row_in_epoch_e_has_its_variant_e_mod_k(source: SourceSpec) -> None:
    found = masked_rows(source)
    rows = source.manifest.num_rows
    assert len(found) == EPOCHS * rows
    for row in range(rows):
        for epoch in range(EPOCHS):
            assert found[epoch, row] == found[epoch % 2, row]
    changed = sum(found[0, row] != found[1, row] for row in range(rows))
    assert changed > 0.9 * rows


def test_a_visit_is_the_same_in_any_company_and_any_batch(source: SourceSpec) -> None:
    rows = np.array([3, 0, 7, 5])
    together = MicroBatches(source).visit(0, rows, 1, index=0)
    other = MicroBatches(replace(source, variants=9, manifest=replace(source.manifest, micro_batch_size=3)))
    for place, row in enumerate(rows):
        alone = other.visit(0, np.array([row]), 1, index=77)
        assert np.array_equal(alone.input_ids_BL[0], together.input_ids_BL[place])
        assert np.array_equal(alone.labels_BL[0], together.labels_BL[place])


def test_frequency_masks_exactly_the_share_of_every_row(source: SourceSpec) -> None:
    assert source.masking is not None
    if source.masking.kind == "uniform":
        pytest.skip("of the other kind")
    batch = MicroBatches(source).visit(0, np.arange(8), 0)
    assert ((batch.labels_BL != IGNORE).sum(1) == np.ceil(0.15 * batch.lengths_B)).all()


def test_seeds_and_variants_differ(source: SourceSpec) -> None:
    rows = np.arange(8)
    reseeded = replace(source, manifest=replace(source.manifest, seed=4))
    first = MicroBatches(source).visit(0, rows, 0)
    for maker, variant in ((MicroBatches(source), 1), (MicroBatches(reseeded), 0)):
        assert not np.array_equal(first.labels_BL, maker.visit(0, rows, variant).labels_BL)


def texts(rows: list[int], index: int = 0) -> TokenBatch:
    """Some of six made texts, of 6 to 11 tokens, each with its number as its visit."""
    lengths_B = np.array([6 + row for row in rows], np.int32)
    labels_BL = np.full((len(rows), 12), IGNORE, np.int32)
    visits_B = np.array(rows, np.int64)
    return TokenBatch(index, np.ones_like(labels_BL), lengths_B, None, labels_BL, len(rows), visits_B)


def test_sampled_places_are_a_rows_own() -> None:
    loss = LossConfig(kd_positions="sample", kd_sample=0.5)
    together = compared_places(texts([0, 1, 2, 3, 4, 5]), loss, seed=3).at_T
    ends = np.cumsum([6, 7, 8, 9, 10, 11])
    for row, length in enumerate(range(6, 12)):
        alone = compared_places(texts([row], index=9), loss, seed=3).at_T
        assert np.array_equal(alone, together[ends[row] - length : ends[row]])
    assert 0.2 < together.mean() < 0.8
    assert not np.array_equal(together, compared_places(texts([0, 1, 2, 3, 4, 5]), loss, seed=4).at_T)


def drawn(visits: list[int], seed: int = 3) -> Any:
    """Soft labels of even distributions at the places of some rows."""
    spec = TargetsSpec(TargetsConfig(codec="sampled", num_draws=40), LossConfig(), (), True, seed)
    logits_NC = torch.zeros(len(visits), 1000)
    return encode_targets(spec, np.array(visits, np.int64), {}, logits_NC)["soft_labels"]


def test_draws_are_a_rows_own() -> None:
    assert drawn([5, 5, 8]) == drawn([5, 5, 8])
    assert drawn([5, 5]) != drawn([5, 6])
    assert drawn([5]) != drawn([5], seed=4)


@pytest.mark.parametrize("variants", [1, 2, 3])
def test_every_position_is_still_visited_once(source: SourceSpec, variants: int) -> None:
    """What is drawn has no say in which rows come when."""
    manifest = Manifest(source.manifest.bucket_rows, EPOCHS, 8, seed=3)
    lists = [manifest.slot(index).positions for index in range(manifest.num_micro_batches)]
    made = MicroBatches(replace(source, variants=variants))
    for index in range(0, manifest.num_micro_batches, 7):
        visits_B = made.make(index).visits_B
        slot = manifest.slot(index)
        assert np.array_equal(visits_B, slot.epoch % variants * manifest.num_rows + slot.rows)
    assert np.array_equal(np.sort(np.concatenate(lists)), np.arange(manifest.num_positions))
