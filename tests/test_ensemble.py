"""Several teachers as one: the mean of what they hold probable, each from a pool of actors of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
import torch.nn.functional as F
from conftest import ONE_THREAD, WORDS
from hypothesis import given
from hypothesis import strategies as st
from kept import filled, teacher_of
from parity import CPU
from sources import class_source, streamed
from torch import Tensor

from raydistil import pipeline, wire
from raydistil.chain import weights_of
from raydistil.config import Config, config_of
from raydistil.config.loss import LossConfig
from raydistil.ensemble import mean_logits, mixed, mixed_draws, mixed_logits, mixed_targets
from raydistil.errors import ConfigError, ModelError
from raydistil.models import load_model, num_parameters
from raydistil.prepare import check_models
from raydistil.source import MicroBatches
from raydistil.targets import decode_targets
from raydistil.types import Mixture, Sparse, TeacherTargets

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = tuple(sorted(WORDS))
NONE = torch.zeros(2)


# ---- the mean


@given(st.floats(0.05, 0.95), st.floats(0.5, 8), st.integers(0, 99))
def test_the_softmax_of_the_mixture_is_the_mean_of_the_softmaxes(weight: float, temperature: float, seed: int) -> None:
    first, second = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    both = mixed_logits([first, second], [weight, 1 - weight], temperature)
    expected = weight * (first / temperature).softmax(-1) + (1 - weight) * (second / temperature).softmax(-1)
    torch.testing.assert_close((both.double() / temperature).softmax(-1), expected, rtol=1e-5, atol=1e-6)


def test_logits_themselves_have_a_mean() -> None:
    first, second = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, -3.0]])
    assert mean_logits([first, second], [0.75, 0.25]).tolist() == [[1.5, 3.0]]


def test_squared_distances_take_the_mean_of_the_logits() -> None:
    said = [TeacherTargets({}, torch.tensor([[1.0, 5.0]])), TeacherTargets({}, torch.tensor([[3.0, -3.0]]))]
    mixture = mixed_targets(said, [0.5, 0.5], LossConfig(divergence="mse")).soft_labels
    assert isinstance(mixture, Mixture)
    assert mixed(mixture).tolist() == [[2.0, 1.0]]


def dense(sparse: Sparse, classes: int) -> Tensor:
    return torch.zeros(len(sparse.ids_NK), classes).scatter_add_(-1, sparse.ids_NK, sparse.probs_NK)


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6))
def test_draws_of_several_are_one_distribution_with_distinct_ids(seed: int, width: int, other: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(kept: int) -> Sparse:
        ids = torch.stack([torch.randperm(9, generator=generator)[:kept] for _ in range(2)])
        probs = torch.rand(2, kept, generator=generator)
        probs[1, kept // 2 :] = 0.0  # padding of the narrower place
        ids[1, kept // 2 :] = 0
        return Sparse(ids, probs, NONE)

    first, second = drawn(width), drawn(other)
    both = mixed_draws([first, second], [0.25, 0.75])
    torch.testing.assert_close(dense(both, 9), 0.25 * dense(first, 9) + 0.75 * dense(second, 9))
    for ids, probs in zip(both.ids_NK, both.probs_NK, strict=True):
        held = ids[probs > 0].tolist()
        assert len(held) == len(set(held))


def test_one_teacher_is_passed_on_as_it_is() -> None:
    said = TeacherTargets({}, torch.ones(2, 3))
    assert mixed_targets([said], [1.0], LossConfig()) is said


# ---- the stream


@pytest.fixture(scope="module")
def classifiers(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"classifier-{seed}")
        model = load_model(tiny_teacher, "classification", LABELS)
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.mark.slow
def test_each_teacher_speaks_once_of_every_micro_batch(
    ray_cluster: None, tiny_teacher: str, classifiers: list[str], tmp_path: Path
) -> None:
    """The first with hidden states; what the student compares itself with is the mean of both."""
    source = class_source(tmp_path, tiny_teacher)
    first = teacher_of(classifiers[0], "classification", (4,), True)
    second = teacher_of(classifiers[1], "classification", (), True)
    rows = streamed(source, (first, second))
    assert len(rows) == source.manifest.num_micro_batches
    names = {tuple(timing.teacher for timing in wire.timings_of(row, 1)) for row in rows}
    assert len(names) == 1  # one actor a pool, built once
    assert len(set(*names)) == 2
    loss = LossConfig(temperature=3.0)
    for row in rows[:: len(rows) // 3]:
        batch, columns = wire.batch_of(row), wire.targets_of(row)
        said = [
            decode_targets(spec.targets, part, batch.num_tokens, CPU)
            for spec, part in zip((first, second), columns, strict=True)
        ]
        assert said[1].states == {}
        taught = mixed_targets(said, [0.25, 0.75], loss)
        assert torch.equal(taught.states[4], said[0].states[4])
        probs = [F.softmax(exact(folder, batch) / 3, -1) for folder in classifiers]
        assert isinstance(taught.soft_labels, Mixture)
        got = F.softmax(mixed(taught.soft_labels) / 3, -1)
        torch.testing.assert_close(got, 0.25 * probs[0] + 0.75 * probs[1], rtol=2e-3, atol=2e-3)


def exact(folder: str, batch: Any) -> Tensor:
    ids_BL = torch.from_numpy(batch.input_ids_BL.astype("int64"))
    real_BL = torch.arange(ids_BL.shape[1]) < torch.tensor(batch.lengths_B)[:, None]
    with torch.no_grad():
        return load_model(folder, "classification").eval()(input_ids=ids_BL, attention_mask=real_BL.long()).logits


def test_each_teacher_has_a_cache_of_its_own(tiny_teacher: str, classifiers: list[str], tmp_path: Path) -> None:
    source = class_source(tmp_path, tiny_teacher)
    asked = ((4,), ()), classifiers
    specs = [teacher_of(folder, "classification", states, True) for states, folder in zip(*asked, strict=True)]
    caches = tuple(filled(source, spec, tmp_path / "kept").caches[0] for spec in specs)
    assert len({cache.fingerprint for cache in caches}) == 2
    row = MicroBatches(replace(source, caches=caches, variants=1)).taught(0)
    assert row.schema == wire.schema_of(2)
    assert [len(columns["states"]) > 0 for columns in wire.targets_of(row)] == [True, False]


# ---- the whole run


def config(folder: Path, corpus: Path | str, *models: str, **changes: Any) -> Config:
    first, *others = models
    tree: dict[str, Any] = {
        "name": "ensemble", "output_dir": str(folder), "task": "classification",
        "corpus": {"source": str(corpus), "test_share": 0.3}, "tokens": {"length": 32, "buckets": [16]},
        "teacher": {"model": first, "weight": 3.0}, "ensemble": [{"model": model} for model in others],
        "student": {"layers": [0, 2]}, "cluster": ONE_THREAD,
        "finetune": {"epochs": 12, "lr": 3e-3, "micro_batch_size": 8},
        "distill": {"epochs": 2, "lr": 3e-3, "micro_batch_size": 8, "general": {"epochs": 0}},
        "evaluate": {"latency_rounds": 3, "latency_length": 16},
    }  # fmt: skip
    return config_of(tree | changes)


def test_weights_are_shares(tmp_path: Path) -> None:
    assert weights_of(config(tmp_path, "rows.txt", "a", "b", "c")) == (0.6, 0.2, 0.2)


@pytest.mark.parametrize(
    ("task", "distill", "words"),
    [
        ("classification", {"loss": {"kd": 0.0, "task": 1.0}}, "say in the soft labels alone: set distill.loss.kd"),
        (
            "classification",
            {"targets": {"codec": "topk"}},
            "hidden or logits or sampled .* got topk .the tails",
        ),
        ("mlm", {}, "expected distill.targets.codec of logits or sampled for task mlm, got hidden .one head"),
    ],
)
def test_what_several_teachers_cannot_say(tmp_path: Path, task: str, distill: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, "rows.txt", "a", "b", task=task, distill=distill)


def test_another_tokenizer_is_refused(tiny_teacher: str, tmp_path: Path) -> None:
    other = decoders.write_model(tmp_path / "model", "gpt2")
    with pytest.raises(ModelError, match=r"ensemble\.0\.model: expected one vocabulary"):
        check_models(config(tmp_path, "rows.txt", tiny_teacher, other))


@pytest.mark.slow
def test_two_teachers_are_tuned_apart_and_heard_together(
    ray_cluster: None, tiny_teacher: str, corpus_file: Path, tmp_path: Path
) -> None:
    made = config(tmp_path, corpus_file, tiny_teacher, tiny_teacher)
    report = pipeline.run_all(made, lambda line: None)
    assert report["stages"]["distill"]["teacher_builds"] == 2
    assert list(report["stages"]) == ["finetune", "finetune-2", "distill"]
    tuned = [load_model(str(made.run_dir / name), "classification") for name in ("teacher", "teacher-2")]
    assert not torch.equal(tuned[0].classifier.weight, tuned[1].classifier.weight)
    assert report["teacher_params"] == sum(num_parameters(model) for model in tuned)
    assert report["teacher_score"] > 0.6 and report["student_score"] > 0.6
    again = pipeline.run_all(made, lambda line: None)
    assert again["student_score"] == report["student_score"]
