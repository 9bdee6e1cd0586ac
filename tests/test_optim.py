"""The optimizer's groups, its schedule and the DeepSpeed configuration."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raydistil.config.train import TrainConfig
from raydistil.optim import deepspeed_config, leave_out_bad_steps, linear_schedule, parameter_groups


def factors(num_steps: int, warmup_share: float) -> list[float]:
    """The learning rate of every step, and after the last one, of a base rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = linear_schedule(num_steps, warmup_share)(optimizer)
    found = []
    for _ in range(num_steps + 1):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing() -> None:
    """10 steps, 4 of them warm-up: a fifth more at each until 1, then 6 steps down to 0."""
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0]
    assert factors(10, 0.4) == pytest.approx(expected)


def test_without_a_warm_up_the_first_step_is_the_largest() -> None:
    assert factors(4, 0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@given(st.integers(1, 60), st.floats(0, 1))
def test_every_step_moves_and_the_end_is_nothing(num_steps: int, warmup_share: float) -> None:
    found = factors(num_steps, warmup_share)
    peak = min(round(num_steps * warmup_share), num_steps - 1)
    assert all(0 < rate <= 1 for rate in found[:-1])
    assert found[-1] == 0
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in decayed["params"]] == [id(model[1].weight)]
    assert kept["weight_decay"] == 0.0
    assert [id(p) for p in kept["params"]] == [id(p) for p in (model[1].bias, model[2].weight, model[2].bias)]


def test_tied_matrices_are_in_a_group_once() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
    model["b"].weight = model["a"].weight
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 0]


def test_the_deepspeed_configuration_says_what_ours_says() -> None:
    train = TrainConfig(
        lr=1e-3,
        betas=(0.5, 0.6),
        eps=1e-5,
        weight_decay=0.25,
        clip=2.0,
        micro_batch_size=4,
        zero_stage=1,
    )
    assert deepspeed_config(train, 3) == {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 2.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 1e-3, "betas": [0.5, 0.6], "eps": 1e-5, "weight_decay": 0.25, "torch_adam": True, "fused": True,
            },
        },
        "zero_optimization": {"stage": 1},
        "steps_per_print": 2**31 - 1,
    }  # fmt: skip


def test_the_users_keys_are_merged_over_ours() -> None:
    over = {
        "zero_optimization": {"overlap_comm": True},
        "optimizer": {"params": {"eps": 1e-6}},
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
    }
    made = deepspeed_config(TrainConfig(zero_stage=2, deepspeed=over), 1)
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert made["optimizer"]["params"]["eps"] == 1e-6
    assert made["optimizer"]["params"]["torch_adam"] is True
    assert made["optimizer"]["type"] == "AdamW"
    assert (made["steps_per_print"], made["wall_clock_breakdown"]) == (10, True)


def test_a_value_of_the_users_can_replace_a_section_of_ours() -> None:
    made = deepspeed_config(TrainConfig(deepspeed={"optimizer": None}), 1)
    assert made["optimizer"] is None
    assert deepspeed_config(TrainConfig(), 1)["optimizer"]["type"] == "AdamW"


# ---- clipping, and steps that are left out


def stepped(gradients: list[list[float]], longest: float, fused: bool) -> list[float]:
    """Weights after a step of Adam for each of `gradients`, by what DeepSpeed's engine would call."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.5, 0.75), eps=1e-8, weight_decay=0.0, fused=fused)
    engine = SimpleNamespace(
        optimizer=optimizer, zero_optimization=lambda: False, gradient_clipping=lambda: longest,
        module=nn.ParameterList([weight]),
    )  # fmt: skip
    leave_out_bad_steps(engine)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        if longest:  # as DeepSpeed does
            engine.clip_fp32_gradients()
        optimizer.step()
    return list(weight.tolist())


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_too_long_is_cut(fused: bool) -> None:
    """(3, 4) of length 5 to (0.6, 0.8) of length 1; one that is short enough stays as it is."""
    short = [0.3, -0.4]
    cut = stepped([[3.0, 4.0], short], 1.0, fused)
    assert cut == pytest.approx(stepped([[0.6, 0.8], short], 100.0, fused), rel=1e-5)
    assert cut != pytest.approx(stepped([[3.0, 4.0], short], 100.0, fused), rel=1e-2)
    by_hand = torch.zeros(2)
    first, second = torch.zeros(2), torch.zeros(2)
    for number, gradient in enumerate((torch.tensor([0.6, 0.8]), torch.tensor(short)), 1):
        first, second = 0.5 * first + 0.5 * gradient, 0.75 * second + 0.25 * gradient**2
        by_hand -= 0.1 * (first / (1 - 0.5**number)) / ((second / (1 - 0.75**number)).sqrt() + 1e-8)
    assert cut == pytest.approx(by_hand.tolist(), rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("longest", [1.0, 0.0])
def test_a_gradient_that_is_no_number_leaves_weights_and_moments_alone(fused: bool, bad: float, longest: float) -> None:
    good = [0.3, -0.4]
    assert stepped([good, [bad, 1.0], good], longest, fused) == stepped([good, good], 1.0, fused)


@pytest.mark.parametrize("fused", [True, False])
def test_no_longest_cuts_nothing(fused: bool) -> None:
    """As DeepSpeed has it: `gradient_clipping` of 0."""
    gradients = [[30.0, 40.0], [0.3, -0.4]]  # two: a first step of Adam's is the same at any length
    assert stepped(gradients, 0.0, fused) == pytest.approx(stepped(gradients, 100.0, fused))
    assert stepped(gradients, 0.0, fused) != pytest.approx(stepped(gradients, 1.0, fused), rel=1e-2)
