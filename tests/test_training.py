"""Training on a CPU: attention in the dtype of its queries, one gradient for a tied matrix, a frozen teacher."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from raydistil.config.loss import LossConfig
from raydistil.heads import Inputs
from raydistil.losses import LossInputs, Projection, kd_and_task
from raydistil.losses.tied import tied
from raydistil.models import HeadedEncoder, num_parameters, vocabulary_head
from raydistil.student.training import NAME, attend, made_for_training
from raydistil.types import IGNORE

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- attention


def heads(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(2, 3, 5, 4, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    query, key, value = made
    return query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """In float64."""
    scores = query.double() @ key.double().transpose(2, 3) / 2
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value.double()).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_attention_and_its_gradients_are_those_of_the_formula(
    dtype: torch.dtype, near: float, masked: bool, added: bool
) -> None:
    mask = torch.arange(5)[None, None, None, :] < torch.tensor([5, 3])[:, None, None, None] if masked else None
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask is not None and added else mask
    parts = heads(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, weights = attend(nn.Module(), *parts, given)
    expected = plain(*parts, mask)
    assert weights is None and out.dtype == dtype and out.shape == (2, 5, 3, 4) and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=near, rtol=near)
    ours = torch.autograd.grad(out.sum(), parts, retain_graph=True)
    theirs = torch.autograd.grad(expected.sum(), parts)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.double(), other.double(), atol=2 * near, rtol=2 * near)


def test_the_scale_is_the_one_that_is_asked_for() -> None:
    query, key, value = heads(torch.float32)
    doubled, _ = attend(nn.Module(), query, key, value, None, scaling=1.0)
    torch.testing.assert_close(doubled.double(), plain(2 * query, key, value, None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_may_look_nowhere_is_a_number_still(dtype: torch.dtype) -> None:
    out, _ = attend(nn.Module(), *heads(dtype), torch.zeros(2, 1, 5, 5, dtype=torch.bool))
    assert out.isfinite().all()


def test_dropout_leaves_out_that_share_and_keeps_the_mean() -> None:
    ones = torch.ones(1, 1, 64, 1)
    torch.manual_seed(0)
    out, _ = attend(nn.Module().train(), ones, ones, ones, None, dropout=0.25)
    assert out.unique().numel() > 1
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    kept, _ = attend(nn.Module().eval(), ones, ones, ones, None, dropout=0.25)
    torch.testing.assert_close(kept, torch.ones_like(kept))


@pytest.mark.parametrize(("family", "name"), [("bert", NAME), ("electra", NAME), ("roberta", NAME), ("mpnet", "eager")])
def test_families_of_plain_attention_are_trained_with_it(family: str, name: str) -> None:
    model = made_for_training(tiny.model(tiny.FAMILIES[family], "mlm"), 0.0, torch.device("cpu"))
    assert model.config._attn_implementation == name
    ids_BL, mask_BL = tiny.ids()
    before = tiny.model(tiny.FAMILIES[family], "mlm").eval()
    after = model.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits
    torch.testing.assert_close(after[mask_BL], before(input_ids=ids_BL, attention_mask=mask_BL).logits[mask_BL])


# ---- tied gradients


def gradient(joined: bool, padding: int | None, learns: bool = True) -> tuple[Tensor | None, list[Tensor]]:
    """(of a matrix of 7 words that is looked up and is the vocabulary, the tensors of that shape that were made)."""
    torch.manual_seed(0)
    words = nn.Embedding(7, 4, padding_idx=padding)
    words.weight.requires_grad_(learns)
    inner = nn.Linear(4, 4)
    both = tied(words, words.weight) if joined else None
    ids = torch.tensor([[1, 2, 1], [0, 5, 0]])
    features_ND = inner(words(ids).flatten(0, 1)).tanh()
    logits = Projection(features_ND, words.weight, None, tied=both)
    labels = torch.tensor([3, IGNORE, 1, 6, 0, 2])
    loss = kd_and_task(LossInputs(logits, labels), LossConfig(kd=0, task=1, cosine=0), 0.0, 2.0).loss
    loss.backward()
    assert inner.weight.grad is not None
    return words.weight.grad, [inner.weight.grad]


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_a_tied_matrix_has_the_sum_of_both_gradients(padding: int | None) -> None:
    (ours, inner), (theirs, other) = gradient(True, padding), gradient(False, padding)
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(inner, other)


def test_a_frozen_tied_matrix_has_none() -> None:
    assert gradient(True, None, learns=False)[0] is None


def test_without_a_head_in_the_loss_the_words_have_their_own() -> None:
    words, other = nn.Embedding(7, 4), nn.Embedding(7, 4)
    other.load_state_dict(words.state_dict())
    assert tied(words, words.weight) is not None
    ids = torch.tensor([1, 1, 6])
    for module in (words, other):
        module(ids).square().sum().backward()
    torch.testing.assert_close(words.weight.grad, other.weight.grad)


def test_what_is_no_plain_look_up_of_the_same_matrix_stays_as_it_is() -> None:
    words = nn.Embedding(7, 4)

    class Scaled(nn.Embedding):
        pass

    scaled = Scaled(7, 4)
    assert tied(words, nn.Parameter(words.weight.detach().clone())) is None
    assert tied(scaled, scaled.weight) is None
    assert tied(nn.Embedding(7, 4, max_norm=1.0), words.weight) is None


# ---- frozen models


@pytest.mark.parametrize("task", ["mlm", "classification"])
def test_a_frozen_model_says_the_same_to_the_bit(task: Any) -> None:
    ids_BL, mask_BL = tiny.ids()
    outs, logits = [], []
    for frozen in (False, True):
        encoder = HeadedEncoder(tiny.model(tiny.FAMILIES["bert"], task), task, "bfloat16")
        encoder = encoder.frozen() if frozen else encoder.eval()
        with torch.inference_mode():
            states, said = encoder(Inputs(ids_BL, mask_BL), (0, 6))
            outs.append(states)
            logits.append(encoder.vocabulary_logits(states[6]) if said is None else said)
    assert torch.equal(*logits)
    assert all(torch.equal(outs[0][n], outs[1][n]) for n in (0, 6))


def test_freezing_casts_the_matrices_alone() -> None:
    encoder = HeadedEncoder(tiny.model(tiny.FAMILIES["bert"], "mlm"), "mlm", "bfloat16").frozen()
    kinds = {
        type(part): part.weight.dtype for part in encoder.modules() if isinstance(getattr(part, "weight", None), Tensor)
    }
    assert kinds == {nn.Linear: torch.bfloat16, nn.Embedding: torch.float32, nn.LayerNorm: torch.float32}
    assert vocabulary_head(encoder.model).weight_VE.dtype == torch.bfloat16
    assert not any(part.requires_grad for part in encoder.parameters())
    exact = HeadedEncoder(tiny.model(tiny.FAMILIES["bert"], "mlm"), "mlm", "float32")
    before = num_parameters(copy.deepcopy(exact))
    assert num_parameters(exact.frozen()) == before
