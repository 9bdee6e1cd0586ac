"""The student with its losses: in bfloat16 the products alone are, heads and relations included."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from raydistil.config.loss import LossConfig
from raydistil.distiller import Distiller
from raydistil.heads import Inputs
from raydistil.layers import plan_layers
from raydistil.losses import LossOutputs, weights_at
from raydistil.models import HeadedEncoder
from raydistil.places import EVEN
from raydistil.types import IGNORE, Precision, TeacherTargets, TokenBatch

pytestmark = pytest.mark.usefixtures("one_thread")


def out_of(precision: Precision, **loss: Any) -> tuple[LossOutputs, Distiller]:
    ids_BL, _ = tiny.ids()
    labels_BL = np.full((2, 9), IGNORE, np.int32)
    labels_BL[:, 2:5] = ids_BL[:, 2:5].numpy()
    batch = TokenBatch(0, ids_BL.numpy().astype(np.int32), np.array([9, 6], np.int32), None, labels_BL, 2, np.arange(2))
    config = LossConfig(**loss)
    teacher, student = (tiny.model(tiny.FAMILIES["bert"], "mlm", seed) for seed in (0, 1))
    layers = plan_layers(config, "mlm", True, 6, 6)
    with torch.no_grad():
        states, _ = HeadedEncoder(teacher, "mlm", "float32")(Inputs(*tiny.ids()), layers.teacher_states)
    distiller = Distiller(HeadedEncoder(student, "mlm", precision), config, layers, 0, teacher)
    return distiller(batch, TeacherTargets(states, None), weights_at(config, 0.0)), distiller


@pytest.mark.parametrize("loss", [{}, {"kd": 0, "task": 0, "cosine": 0, "minilm": {"relation_heads": 4}}])
def test_losses_are_float32_whatever_the_products_are(loss: dict[str, Any]) -> None:
    (exact, _), (rough, distiller) = out_of("float32", **loss), out_of("bfloat16", **loss)
    rough.loss.backward()
    for name, value in rough.metrics.items():
        assert value.dtype == torch.float32
        assert value.item() != exact.metrics[name].item()
        assert value.item() == pytest.approx(exact.metrics[name].item(), rel=0.1)
    assert {p.grad.dtype for p in distiller.parameters() if p.grad is not None} == {torch.float32}


def test_the_head_runs_in_the_chosen_precision_and_in_few_shapes() -> None:
    """Six places are compared: their products have EVEN rows, as those of any number up to it."""
    seen: list[tuple[torch.dtype, torch.Size]] = []

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "mm" in func.__name__:
                seen.append((out.dtype, out.shape))
            return out

    with Products():
        out_of("bfloat16")
    head = {(dtype, shape[0]) for dtype, shape in seen if shape[-1] == tiny.SHAPE["vocab_size"]}
    assert head == {(torch.bfloat16, EVEN)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_of_a_teacher_is_saved_with_the_student(precision: Precision) -> None:
    _, used = out_of(precision)
    assert {name.partition(".")[0] for name in used.state_dict()} == {"encoder"}
