"""What the stream delivers trains the student as one process would: losses and every parameter's gradient.

The reference (`reference.py`) is written from the papers' formulas, runs one row at a time without padding, and is fed
the targets as the wire rounded them. Dropout 0, one thread, float32.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from kept import sized
from parity import CPU, Streamed, check, check_narrow, gradients, one_micro_batch, trained
from sources import class_source, mlm_source
from torch import Tensor
from transformers import PreTrainedModel

from raydistil.config.loss import LossConfig
from raydistil.config.targets import TargetsConfig
from raydistil.ensemble import mixed_targets
from raydistil.models import load_model, load_tokenizer
from raydistil.places import compared_places
from raydistil.specs import TeacherSpec
from raydistil.targets import targets_for
from raydistil.teacher import Teacher
from raydistil.types import IGNORE, Sparse

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = ("fruit", "metal", "river")
NOTHING: dict[str, Any] = {"kd": 0, "task": 0, "cosine": 0}


@pytest.fixture(scope="module")
def opinionated(tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny teacher with weights large enough that its distributions are far from even ones."""
    path = tmp_path_factory.mktemp("teacher")
    model = load_model(tiny_teacher, "mlm")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(path)
    load_tokenizer(tiny_teacher).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def mlm(ray_cluster: None, opinionated: str, tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    source = mlm_source(tmp_path_factory.mktemp("mlm"), opinionated)
    return one_micro_batch("mlm", opinionated, source, TargetsConfig(), False, LossConfig(), ray=True)


@pytest.fixture(scope="module")
def classes(ray_cluster: None, opinionated: str, tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    load_model(opinionated, "classification", LABELS).save_pretrained(folder)
    source = class_source(tmp_path_factory.mktemp("classes"), opinionated)
    return one_micro_batch(
        "classification", str(folder), source, TargetsConfig(), True, LossConfig(), ray=True, labels=LABELS
    )


# ---- masked-LM: the triple loss and the layers'


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_triple(mlm: Streamed, positions: str) -> None:
    config = LossConfig(kd=5, task=2, cosine=1, temperature=2, kd_positions=positions)
    check(mlm, config, lambda student, rows: reference.triple(rows, student, mlm.teacher(), config, 4))


@pytest.mark.parametrize("keys", [
    {"task": 2}, {"kd_positions": "all"}, {"kd_positions": "sample", "kd_sample": 0.3},
    {"kd_positions": "sample", "kd_sample": 1e-9},
])  # fmt: skip
def test_states_of_the_compared_places_train_as_those_of_all(
    opinionated: str, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Bit by bit, and be there none of them."""
    loss = LossConfig(**NOTHING | {"kd": 5, **keys})
    source = mlm_source(tmp_path, opinionated)
    whole = one_micro_batch("mlm", opinionated, source, TargetsConfig(), False, loss, ray=False)
    wanted = replace(whole.targets, states=(4,), compared=True)
    columns = Teacher(TeacherSpec(opinionated, "mlm", "float32", 1, wanted)).targets(whole.batch)
    compared = int(compared_places(whole.made, loss, 3).at_T.sum())
    assert len(columns["states"]) == 2 * 32 * max(1, compared) <= 2 * 32 * whole.batch.num_tokens
    part = replace(whole, targets=wanted, given=targets_for(wanted, columns, whole.batch, CPU))
    (one, of_all), (other, of_some) = (trained(case, case.student(), loss) for case in (whole, part))
    assert torch.equal(of_all, of_some)
    expected, got = gradients(one, of_all), gradients(other, of_some)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


def test_hidden(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, hidden={"weight": 0.7})
    pairs = [(0, 0), (2, 1), (4, 2)]
    check(mlm, config, lambda student, rows: 0.7 * reference.hidden_mse(rows, pairs))


def test_pkd(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, pkd={"weight": 3.0, "layers": ((1, 1), (4, 2))})
    check(mlm, config, lambda student, rows: 3 * reference.patient(rows, [(1, 1), (4, 2)]))


def test_attention(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, attention={"weight": 2.0})
    pairs = [(2, 1), (4, 2)]
    check(mlm, config, lambda student, rows: 2 * reference.attention_mse(rows, student, mlm.teacher(), pairs))


def test_minilm(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, minilm={"version": 1})
    check(
        mlm, config,
        lambda student, rows: reference.relation_kl(rows, student, mlm.teacher(), (4, 2), 4, reference.version1),
    )  # fmt: skip


@pytest.mark.parametrize(("layer", "heads"), [(4, 4), (3, 8), (1, 2)])
def test_minilm2(mlm: Streamed, layer: int, heads: int) -> None:
    config = LossConfig(**NOTHING, minilm={"teacher_layer": layer, "relation_heads": heads})
    check(
        mlm, config,
        lambda student, rows: reference.relation_kl(
            rows, student, mlm.teacher(), (layer, 2), heads, reference.version2
        ),
    )  # fmt: skip


# ---- masked-LM: soft labels that travel as such


@pytest.mark.parametrize(("codec", "positions"), [("logits", "all"), ("topk", "sample"), ("sampled", "masked")])
def test_codecs(opinionated: str, tmp_path: Path, codec: str, positions: str) -> None:
    """Fed what the codec left of them, soft labels train as the formula says; how much it leaves is tested apart."""
    source = mlm_source(tmp_path, opinionated)
    config = TargetsConfig(**sized(codec, 5, 20))
    loss = LossConfig(kd=3, task=1, cosine=0, kd_positions=positions)
    case = one_micro_batch("mlm", opinionated, source, config, True, loss, ray=False)
    places = compared_places(case.made, loss, 3)
    at_T, kd_N = torch.from_numpy(places.at_T), torch.from_numpy(places.kd_N)
    given = case.given.soft_labels

    def expected(student: PreTrainedModel, rows: reference.Rows) -> Tensor:
        logits = student.cls(torch.cat([row[0][-1] for row in rows]))
        labels = torch.cat([row[2] for row in rows])
        compared = logits[at_T][kd_N]
        if isinstance(given, Sparse):
            soft = reference.sparse_kl(compared, given.ids_NK[kd_N], given.probs_NK[kd_N], given.tail_N[kd_N], 2.0)
        else:
            soft = reference.divergence("forward_kl", compared, given[kd_N].float(), 2.0, 0.5)
        return 3 * soft + torch.nn.functional.cross_entropy(logits, labels)

    assert 0 < kd_N.sum() <= len(at_T)
    check(case, loss, expected)


# ---- classification


def class_logits(student: PreTrainedModel, case: Streamed) -> Tensor:
    ids_BL = torch.from_numpy(case.made.input_ids_BL.astype("int64"))
    mask_BL = torch.arange(ids_BL.shape[1])[None] < torch.from_numpy(case.made.lengths_B)[:, None]
    return student(input_ids=ids_BL, attention_mask=mask_BL).logits


KINDS = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "mse"]


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_of_classes(classes: Streamed, kind: str) -> None:
    beta = {"beta": 0.3} if kind == "jensen_shannon" else {}
    config = LossConfig(kd=5, task=0.5, cosine=0, divergence=kind, temperature=3, label_smoothing=0.1, **beta)

    def expected(student: PreTrainedModel, rows: reference.Rows) -> Tensor:
        logits = class_logits(student, classes)
        labels = torch.from_numpy(classes.made.labels_B.astype("int64"))
        hard = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        return 5 * reference.divergence(kind, logits, classes.given.soft_labels.float(), 3, 0.3) + 0.5 * hard

    check(classes, config, expected)


@pytest.mark.parametrize("kind", ["forward_kl", "mse"])
def test_several_teachers(classes: Streamed, kind: str) -> None:
    """Of what each says as the wire rounded it, the weighted mean: of probabilities, or of logits."""
    config = LossConfig(kd=5, task=0, cosine=0, divergence=kind, temperature=3)
    first = classes.given.soft_labels
    second = torch.randn(first.shape, generator=torch.Generator().manual_seed(3)).half()
    said = [classes.given, replace(classes.given, soft_labels=second)]
    both = replace(classes, given=mixed_targets(said, [0.3, 0.7], config))

    def expected(student: PreTrainedModel, rows: reference.Rows) -> Tensor:
        logits, parts = class_logits(student, classes), (first.float(), second.float())
        if kind == "mse":
            return 5 * (logits - (0.3 * parts[0] + 0.7 * parts[1])).square().mean()
        p = 0.3 * (parts[0] / 3).softmax(-1) + 0.7 * (parts[1] / 3).softmax(-1)
        q = (logits / 3).softmax(-1)
        return 5 * 9 * (p * (p / q).log()).sum() / len(logits)

    check(both, config, expected)


def test_several_teachers_of_a_vocabulary(opinionated: str, tmp_path: Path) -> None:
    source, loss = mlm_source(tmp_path, opinionated), LossConfig(kd=3, task=0, cosine=0, kd_positions="all")
    case = one_micro_batch("mlm", opinionated, source, TargetsConfig(codec="logits"), True, loss, ray=False)
    first = case.given.soft_labels
    second = first.flip(-1)
    said = [case.given, replace(case.given, soft_labels=second)]
    both = replace(case, given=mixed_targets(said, [0.25, 0.75], loss))

    def expected(student: PreTrainedModel, rows: reference.Rows) -> Tensor:
        q = (student.cls(torch.cat([row[0][-1] for row in rows])) / 2).softmax(-1)
        p = 0.25 * (first.float() / 2).softmax(-1) + 0.75 * (second.float() / 2).softmax(-1)
        return 3 * 4 * (p * (p / q).log()).sum() / len(q)

    check(both, loss, expected)


def first_units(rows: reference.Rows, side: int, layer: int) -> list[Tensor]:
    return [row[side][layer][0] / row[side][layer][0].norm() for row in rows]


def mean_units(rows: reference.Rows, layer: int) -> list[Tensor]:
    means = [row[0][layer].mean(0) for row in rows]
    return [mean / mean.norm() for mean in means]


def test_triplet_hard(classes: Streamed) -> None:
    config = LossConfig(**NOTHING, triplet={"margin": 0.4})
    labels = classes.made.labels_B.tolist()
    check(classes, config, lambda _, rows: reference.hard_triplets(first_units(rows, 0, 2), labels, 0.4))


def test_triplet_semi_hard(classes: Streamed) -> None:
    config = LossConfig(**NOTHING, triplet={"mining": "semi_hard", "pooling": "mean"})
    labels = classes.made.labels_B.tolist()
    check(classes, config, lambda _, rows: reference.semi_hard_triplets(mean_units(rows, 2), labels, 0.2))


def test_triplet_guided(classes: Streamed) -> None:
    config = LossConfig(**NOTHING, triplet={"guided": True, "margin": 0.1, "largest_margin": 0.9})
    labels = classes.made.labels_B.tolist()
    check(
        classes, config,
        lambda _, rows: reference.guided_triplets(
            first_units(rows, 0, 2), first_units(rows, 1, 4), labels, 0.1, 0.9
        ),
    )  # fmt: skip


def unlabelled(case: Streamed, *rows: int) -> tuple[Streamed, list[int]]:
    """The case with `rows` without a label, as augmented texts are, and the rows that have one."""
    labels_B = case.batch.labels_B.copy()
    labels_B[list(rows)] = IGNORE
    kept = [n for n in range(len(labels_B)) if n not in rows]
    return replace(case, batch=replace(case.batch, labels_B=labels_B)), kept


@pytest.mark.parametrize("term", ["hard", "semi_hard", "guided", "contrastive"])
def test_texts_without_a_label_are_of_no_class(classes: Streamed, term: str) -> None:
    """Not one more class of their own: the loss is that of the labelled ones alone."""
    case, kept = unlabelled(classes, 0, 3)
    labels = [int(classes.made.labels_B[n]) for n in kept]
    config = LossConfig(**NOTHING, **METRIC[term])

    def expected(_: PreTrainedModel, rows: reference.Rows) -> Tensor:
        units = [first_units(rows, 0, 2)[n] for n in kept]
        if term == "guided":
            return reference.guided_triplets(units, [first_units(rows, 1, 4)[n] for n in kept], labels, 0.2, 0.5)
        if term == "contrastive":
            return reference.supervised_contrastive(units, labels, 0.1)
        apart = reference.hard_triplets if term == "hard" else reference.semi_hard_triplets
        return apart(units, labels, 0.2)

    check(case, config, expected)


METRIC: dict[str, dict[str, Any]] = {
    "hard": {"triplet": {}}, "semi_hard": {"triplet": {"mining": "semi_hard"}},
    "guided": {"triplet": {"guided": True}}, "contrastive": {"contrastive": {}},
}  # fmt: skip


@pytest.mark.parametrize("term", METRIC)
@pytest.mark.parametrize("left", [(), (1,), (1, 2)])
def test_where_nothing_can_be_told_apart_nothing_is_learned(
    classes: Streamed, term: str, left: tuple[int, ...]
) -> None:
    """No label, one, or two of which none is of the other's class (contrastive: of the same)."""
    labels = classes.made.labels_B.tolist()
    alike = [n for n in range(len(labels)) if (labels[n] == labels[1]) == (term != "contrastive")]
    kept = {(): [], (1,): [1], (1, 2): [1, next(n for n in alike if n != 1)]}[left]
    case, _ = unlabelled(classes, *(n for n in range(len(labels)) if n not in kept))
    config = LossConfig(**NOTHING, **METRIC[term])
    distiller, loss = trained(case, case.student(), config)
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(distiller, loss).values())


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_contrastive(classes: Streamed, pooling: str) -> None:
    config = LossConfig(**NOTHING, contrastive={"temperature": 0.2, "pooling": pooling})
    labels = classes.made.labels_B.tolist()

    def expected(_: PreTrainedModel, rows: reference.Rows) -> Tensor:
        units = first_units(rows, 0, 2) if pooling == "first" else mean_units(rows, 2)
        return reference.supervised_contrastive(units, labels, 0.2)

    check(classes, config, expected)


# ---- a student half as wide: hidden states meet in a learned projection, and what shapes its own space does not


def test_hidden_of_a_narrow_student(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, hidden={"weight": 0.7})
    pairs = [(0, 0), (2, 1), (4, 2)]
    check_narrow(mlm, config, lambda _, rows, projected: 0.7 * reference.hidden_mse(projected, pairs))


def test_pkd_of_a_narrow_student(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, pkd={"weight": 3.0, "layers": ((1, 1), (4, 2))})
    check_narrow(mlm, config, lambda _, rows, projected: 3 * reference.patient(projected, [(1, 1), (4, 2)]))


def test_minilm2_of_a_narrow_student(mlm: Streamed) -> None:
    config = LossConfig(**NOTHING, minilm={"relation_heads": 4})

    def expected(student: PreTrainedModel, rows: reference.Rows, projected: reference.Rows) -> Tensor:
        return reference.relation_kl(rows, student, mlm.teacher(), (4, 2), 4, reference.version2)

    check_narrow(mlm, config, expected)


@pytest.mark.parametrize("term", ["triplet", "contrastive"])
def test_classes_part_in_a_narrow_students_own_space(classes: Streamed, term: str) -> None:
    config = LossConfig(**NOTHING, hidden={}, **{term: {}})
    labels = classes.made.labels_B.tolist()

    def expected(_: PreTrainedModel, rows: reference.Rows, projected: reference.Rows) -> Tensor:
        units = first_units(rows, 0, 2)
        apart = reference.hard_triplets if term == "triplet" else reference.supervised_contrastive
        default = 0.2 if term == "triplet" else 0.1  # the margin, the temperature
        return reference.hidden_mse(projected, [(0, 0), (2, 1), (4, 2)]) + apart(units, labels, default)

    check_narrow(classes, config, expected)
