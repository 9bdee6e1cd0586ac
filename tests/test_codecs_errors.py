"""What codecs do to the loss of distillation and its gradient, on real states: MiniLM teaching three of its own layers.

    pytest -s tests/test_codecs_errors.py       prints the tables

The logits are those of a masked-LM head in small: LayerNorm(states) times the word embeddings, over 30,522 entries, at
places of real docstrings, scaled so that the teacher's entropy is that of a masked language model, 1 to 3 nats. The
`far` student is three layers of MiniLM as they are; `near` stands in for what it becomes: a tenth of the far one's
states and nine tenths of the teacher's. N places, D hidden size, V vocabulary, K kept entries.
"""

import argparse
import copy
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import MINILM
from torch import Tensor, nn
from transformers import AutoModel

from raydistil.codecs.soft_labels import Logits, Sampled, SoftLabelCodec, TopK
from raydistil.codecs.states import StateDtype, decode_states, encode_states
from raydistil.corpus import python_docs
from raydistil.losses.sparse import sparse_kl
from raydistil.models import load_tokenizer, resolve
from raydistil.types import Sparse

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
Graded = tuple[Tensor, Tensor]  # loss of each place, gradient in its logits
PLACES, SCALE, TEMPERATURE, SEEDS = 64, 4.0, 1.0, 32


@dataclass(frozen=True, slots=True)
class Case:
    """What teacher and student say of the same places, and the decoder they share."""

    teacher_ND: Tensor
    student_ND: Tensor
    decoder_VD: Tensor

    def logits(self, states_ND: Tensor) -> Tensor:
        """float32 [N, V]."""
        return F.layer_norm(states_ND, states_ND.shape[-1:]) @ self.decoder_VD.T * SCALE


@dataclass(frozen=True, slots=True)
class CodecError:
    """How far loss and gradient with respect to the student's logits are from the exact ones, all places together."""

    name: str
    bytes_per_place: float  # as encoded, the header included
    degrees: float  # between the two gradients [N, V]
    relative: float  # ||g - exact|| / ||exact||
    state_degrees: float  # the same after the decoder: gradients [N, D] of its input, where draws average out
    loss: float  # as a share of the exact one, its error; of draws another loss is meant, see `sparse_kl`

    def __str__(self) -> str:
        numbers = f"{self.bytes_per_place:>12,.1f} {self.degrees:>9.3f} {self.relative:>10.2e}"
        return f"{self.name:<14}{numbers} {self.state_degrees:>15.3f} {self.loss:>10.2e}"


def codec_errors(case: Case, temperature: float) -> dict[str, CodecError]:
    """One line a codec; those that draw, with key 0."""
    student_NV, teacher_NV = case.logits(case.student_ND), case.logits(case.teacher_ND)
    measured = partial(measure, case=case, exact=exact_graded(student_NV, teacher_NV, temperature))
    dtypes: tuple[StateDtype, ...] = ("fp16", "bf16", "int8")
    codecs: tuple[SoftLabelCodec, ...] = (
        Logits(), *map(TopK, (1, 8, 32, 128, 512)), *map(Sampled, (12, 50, 200, 800)),
    )  # fmt: skip
    rows = []
    for dtype in dtypes:
        encoded = encode_states(case.teacher_ND, dtype)
        rounded_NV = case.logits(decode_states(encoded, len(case.teacher_ND), dtype, CPU))
        rows.append(measured(f"states {dtype}", encoded, exact_graded(student_NV, rounded_NV, temperature)))
    for codec in codecs:
        encoded = codec.encode(teacher_NV, temperature, 0)
        graded = codec_graded(codec, encoded, student_NV, temperature)
        number = codec.k if isinstance(codec, TopK) else codec.num_draws if isinstance(codec, Sampled) else ""
        rows.append(measured(f"{type(codec).__name__.lower()} {number}".strip(), encoded, graded))
    encoded = TopK(32).encode(teacher_NV, temperature, 0)
    kept = TopK(32).decode(encoded, CPU)
    rows.append(measured("  no tail", encoded, sparse_kl(student_NV, without_tail(kept), temperature)))
    rows.append(measured("  even tail", encoded, even_tail_graded(student_NV, kept, temperature)))
    return {row.name: row for row in rows}


def without_tail(kept: Sparse) -> Sparse:
    """The kept entries scaled to sum to 1, the tail forgotten."""
    return Sparse(kept.ids_NK, kept.probs_NK / kept.probs_NK.sum(-1, keepdim=True), torch.zeros_like(kept.tail_N))


def even_tail_graded(student_NV: Tensor, kept: Sparse, temperature: float) -> Graded:
    """As if the teacher's tail were spread evenly over the entries that are not kept."""
    others = student_NV.shape[1] - kept.ids_NK.shape[1]
    spread_NV = (kept.tail_N / others)[:, None].expand_as(student_NV)
    return exact_graded(student_NV, spread_NV.scatter(-1, kept.ids_NK, kept.probs_NK).log() * temperature, temperature)


def measure(name: str, encoded: bytes, got: Graded, case: Case, exact: Graded) -> CodecError:
    (loss_N, gradient_NV), (exact_N, exact_NV) = got, exact
    relative = ((gradient_NV - exact_NV).norm() / exact_NV.norm()).item()
    places, states = len(exact_NV), case.decoder_VD
    return CodecError(
        name, len(encoded) / places, degrees(gradient_NV, exact_NV), relative,
        degrees(gradient_NV @ states, exact_NV @ states), abs(loss_N.sum() / exact_N.sum() - 1).item(),
    )  # fmt: skip


def degrees(left: Tensor, right: Tensor) -> float:
    """Angle between two tensors as vectors; from their difference, which is exact for small ones."""
    left, right = left.double() / left.double().norm(), right.double() / right.double().norm()
    return float(2 * torch.rad2deg(torch.atan2((left - right).norm(), (left + right).norm())))


def exact_graded(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Graded:
    """T^2 KL of each place, and its gradient T (softmax(s / T) - softmax(t / T))."""
    log_q_NV, log_p_NV = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))
    loss_N = temperature**2 * (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    return loss_N, temperature * (log_q_NV.exp() - log_p_NV.exp())


def codec_graded(codec: SoftLabelCodec, encoded: bytes, student_NV: Tensor, temperature: float) -> Graded:
    labels = codec.decode(encoded, CPU)
    if isinstance(labels, Tensor):
        return exact_graded(student_NV, labels.float(), temperature)
    return sparse_kl(student_NV, labels, temperature)


STUDENTS = ("far", "near")


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """64 places spread over real docstrings, the teacher's and two students' states there."""
    teacher = AutoModel.from_pretrained(resolve(MINILM)).eval()
    student = copy.deepcopy(teacher)
    student.encoder.layer = nn.ModuleList(student.encoder.layer[number] for number in (0, 3, 5))
    texts = [
        text for module in (argparse, statistics) for _, text in python_docs.parse(Path(module.__file__ or "")).texts
    ]  # fmt: skip
    batch = load_tokenizer(MINILM)(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    real_BL = batch["attention_mask"].bool()
    with torch.no_grad():
        teacher_TD, far_TD = (model(**batch).last_hidden_state[real_BL] for model in (teacher, student))
    at_N = torch.linspace(0, len(teacher_TD) - 1, PLACES).long()
    teacher_ND, far_ND = (F.layer_norm(states_TD[at_N], states_TD.shape[-1:]) for states_TD in (teacher_TD, far_TD))
    decoder_VD = teacher.embeddings.word_embeddings.weight.detach()
    near_ND = 0.1 * far_ND + 0.9 * teacher_ND
    return {"far": Case(teacher_ND, far_ND, decoder_VD), "near": Case(teacher_ND, near_ND, decoder_VD)}


@pytest.fixture(scope="module")
def tables(cases: dict[str, Case]) -> dict[str, dict[str, CodecError]]:
    return {name: printed(name, case) for name, case in cases.items()}


def printed(name: str, case: Case) -> dict[str, CodecError]:
    table = codec_errors(case, TEMPERATURE)
    logs_NV, student_NV = (case.logits(states).log_softmax(-1) for states in (case.teacher_ND, case.student_ND))
    entropy, divergence = (-(logs_NV.exp() * other_NV).sum(-1).mean() for other_NV in (logs_NV, student_NV - logs_NV))
    print(f"\n{name}: the teacher's entropy is {entropy:.2f} nats, KL to the student {divergence:.2f} nats")
    print(f"{'codec':<14}{'bytes/place':>12} {'degrees':>9} {'relative':>10} {'degrees, states':>15} {'loss':>10}")
    print(*table.values(), sep="\n")
    return table


def test_the_teacher_is_as_sure_as_a_masked_language_model(cases: dict[str, Case]) -> None:
    logs_NV = cases["far"].logits(cases["far"].teacher_ND).log_softmax(-1)
    assert logs_NV.shape == (PLACES, 30522)
    assert 1 < -(logs_NV.exp() * logs_NV).sum(-1).mean().item() < 3


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("field", ["degrees", "relative", "loss"])
def test_finer_numbers_move_the_gradient_less(
    tables: dict[str, dict[str, CodecError]], student: str, field: str
) -> None:
    """bf16 has three bits less than fp16; int8 is coarser still."""
    names = ("states fp16", "states bf16", "states int8")
    fp16, bf16, int8 = (getattr(tables[student][name], field) for name in names)
    assert 0 < 4 * fp16 < bf16 < int8


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("field", ["degrees", "relative", "state_degrees", "loss"])
def test_a_larger_k_moves_the_gradient_less(tables: dict[str, dict[str, CodecError]], student: str, field: str) -> None:
    ranked = [getattr(tables[student][f"topk {k}"], field) for k in (1, 8, 32, 128, 512)]
    assert ranked == sorted(ranked, reverse=True)
    assert ranked[-1] < ranked[0] / 10


def test_the_bytes_are_the_formats(tables: dict[str, dict[str, CodecError]]) -> None:
    sizes = {name: row.bytes_per_place for name, row in tables["far"].items()}
    header = 16 / PLACES
    assert [sizes[f"states {dtype}"] for dtype in ("fp16", "bf16", "int8")] == [768, 768, 388]
    assert sizes["logits"] == 61_044 + header
    assert sizes["topk 32"] == 130 + header
    assert 4 + header <= sizes["sampled 12"] <= 37 + header


@pytest.mark.parametrize("student", STUDENTS)
def test_the_mean_over_draws_goes_to_the_exact_gradient(cases: dict[str, Case], student: str) -> None:
    """The squared error of the mean over S keys of R draws each is sum p (1 - p) / (R S)."""
    case, draws = cases[student], Sampled(50)
    student_NV, teacher_NV = case.logits(case.student_ND), case.logits(case.teacher_ND)
    _, exact_NV = exact_graded(student_NV, teacher_NV, TEMPERATURE)
    probs_NV = teacher_NV.softmax(-1)
    spread = (probs_NV * (1 - probs_NV)).sum().sqrt().item()
    total_NV = torch.zeros_like(exact_NV)
    for seeds in range(1, SEEDS + 1):
        encoded = draws.encode(teacher_NV, TEMPERATURE, seeds)
        total_NV += codec_graded(draws, encoded, student_NV, TEMPERATURE)[1]
        if seeds in (1, 8, SEEDS):
            error = (total_NV / seeds - exact_NV).norm().item()
            assert error == pytest.approx(spread / (50 * seeds) ** 0.5, rel=0.15)


def test_a_student_like_the_teacher_is_left_alone_only_with_the_tail(cases: dict[str, Case]) -> None:
    """There the exact gradient is 0. Without its tail, top-k pulls by what it added to the entries it kept."""
    teacher_NV = cases["far"].logits(cases["far"].teacher_ND)
    kept = TopK(32).decode(TopK(32).encode(teacher_NV, TEMPERATURE, 0), CPU)
    _, with_NV = sparse_kl(teacher_NV, kept, TEMPERATURE)
    _, without_NV = sparse_kl(teacher_NV, without_tail(kept), TEMPERATURE)
    rounding = 2**-11 * PLACES**0.5  # of fp16 logarithms around 1, in every place
    assert with_NV.norm() < 4 * rounding
    assert without_NV.norm() > 40 * rounding
    pulled_N = -without_NV.gather(-1, kept.ids_NK).sum(-1)
    assert torch.allclose(pulled_N, kept.tail_N, rtol=0.02, atol=2e-3)


def test_the_tail_matters_near_the_teacher_and_misleads_far_from_it(
    tables: dict[str, dict[str, CodecError]],
) -> None:
    """A student far off has its own idea of what the tail is; then a tail spread evenly is closer to the truth."""
    far, near = tables["far"], tables["near"]
    assert near["topk 32"].relative < near["  no tail"].relative / 2
    assert far["  even tail"].relative < far["  no tail"].relative < far["topk 32"].relative
