"""Narrower students: what must come out exactly, and that what is kept is closer to the teacher than chance."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    ElectraConfig,
    PreTrainedConfig,
    PreTrainedModel,
    XLMRobertaConfig,
)

from raydistil.config.student import Narrowing, StudentConfig
from raydistil.errors import ModelError
from raydistil.student import build_student, check_student
from raydistil.student.narrow import Widths, layer_norms, most_important, narrowed, unlike_units
from raydistil.types import Task

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS: tuple[Task, ...] = ("mlm", "classification")
KINDS: tuple[Narrowing, ...] = ("importance", "svd", "random")
SHAPE = {**tiny.SHAPE, "num_hidden_layers": 3, "num_attention_heads": 4}  # heads of 4 units
FAMILIES: dict[str, PreTrainedConfig] = {
    **{name: type(config)(**SHAPE) for name, config in tiny.FAMILIES.items() if name != "electra"},
    "electra": ElectraConfig(**SHAPE, embedding_size=16),
    "xlm-roberta": XLMRobertaConfig(**SHAPE),
    "camembert": CamembertConfig(**SHAPE),
}
SAME = Widths(16, 4, 24)


def logits(model: PreTrainedModel, rows: int = 2) -> Tensor:
    ids_BL, mask_BL = tiny.ids(rows)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids_BL, attention_mask=mask_BL).logits
    return found


# ---- shapes


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_model_is_saved_loaded_and_run(tmp_path: Path, family: str, task: Task, how: Narrowing) -> None:
    teacher = tiny.model(FAMILIES[family], task)
    config = StudentConfig(layers=(0, 2), hidden_size=12, num_heads=4, ffn_size=10, narrow=how)
    student = build_student(teacher, config, task)
    student.save_pretrained(tmp_path)
    maker = AutoModelForMaskedLM if task == "mlm" else AutoModelForSequenceClassification
    again = maker.from_pretrained(tmp_path)
    shape = again.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads, shape.intermediate_size) == (
        2, 12, 4, 10,
    )  # fmt: skip
    assert torch.equal(logits(again), logits(student))
    assert logits(student).shape == logits(teacher).shape
    assert teacher.config.hidden_size == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_one_encoder_keep_the_same_units_whatever_the_head(family: str) -> None:
    """A general student, of a checkpoint without the task's head, hands its layers to one that has it."""
    teacher = tiny.model(FAMILIES[family], "classification")
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "pooler" in name or "classifier" in name:
                weight.copy_(torch.randn_like(weight) * torch.logspace(0, 3, weight.shape[-1]))
    one, two = (most_important(model, Widths(8, 2, 12)) for model in (teacher, other))
    assert torch.equal(one.hidden, two.hidden)
    for part in ("heads", "query", "value", "ffn"):
        assert all(map(torch.equal, getattr(one, part), getattr(two, part)))


# ---- exact


@pytest.mark.parametrize("how", ["importance", "svd"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_to_leave_nothing_out_changes_nothing(family: str, task: Task, how: Narrowing) -> None:
    teacher = tiny.model(FAMILIES[family], task)
    assert torch.equal(logits(narrowed(teacher, SAME, how)), logits(teacher))


def test_neurons_that_read_nothing_or_go_nowhere_are_left_out_first() -> None:
    teacher = tiny.model(FAMILIES["bert"], "mlm")
    with torch.no_grad():
        for number, layer in enumerate(teacher.bert.encoder.layer):
            silent, unread = slice(number, 24, 4), slice(number + 1, 24, 4)
            layer.intermediate.dense.weight[silent] = 0
            layer.intermediate.dense.bias[silent] = 0
            layer.output.dense.weight[:, unread] = 0
    student = narrowed(teacher, Widths(16, 4, 12), "importance")
    assert student.bert.encoder.layer[0].intermediate.dense.weight.shape == (12, 16)
    assert torch.allclose(logits(student), logits(teacher), atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_model_that_was_widened_by_nothing_is_found_again(family: str, task: Task) -> None:
    """The wide model holds every hidden unit twice (so LayerNorms see the same mean and variance) and reads the first
    of each pair; its further heads and neurons have nothing to say."""
    shape = type(FAMILIES[family])(**SHAPE, tie_word_embeddings=False)  # a tied head reads both of a pair
    small = tiny.model(shape, task)
    wide = widened(small)
    assert torch.allclose(logits(wide), logits(small), atol=1e-5)
    again = narrowed(wide, SAME, "importance")
    given, taken = small.state_dict(), again.state_dict()
    assert given.keys() == taken.keys()
    assert all(torch.equal(taken[name], given[name]) for name in given)


def widened(small: PreTrainedModel) -> PreTrainedModel:
    """Twice the hidden units, heads and neurons, the same function."""
    config = copy.deepcopy(small.config)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 32, 8, 48
    wide: PreTrainedModel = type(small)(config).eval()
    weights = {}
    for name, shape in ((name, tensor.shape) for name, tensor in wide.state_dict().items()):
        tensor = small.state_dict()[name]
        rows, columns = (shape[dim] // tensor.shape[dim] for dim in (0, -1))
        if any(part in name for part in ("query", "key", ".attn.q", ".attn.k", "relative_attention")):
            grown = torch.cat([tensor, tensor]) if rows == 2 else torch.cat([tensor, tensor], -1)
        elif any(part in name for part in ("value", ".attn.v", "intermediate", "pooler", "classifier.dense")):
            grown = torch.cat([tensor, 0 * tensor])
        else:
            grown = torch.cat([tensor, tensor]) if rows == 2 else tensor
        if tensor.dim() == 2 and columns == 2 and grown.shape != shape:
            twice = "_embeddings" in name
            grown = torch.cat([grown, grown if twice else 0 * grown], 1)
        weights[name] = grown
    wide.load_state_dict(weights)
    return wide


def test_smaller_heads_score_as_the_larger_ones_did() -> None:
    """Heads whose last two of four units are zero: halved, they divide by another root, and queries make up for it."""
    teacher = tiny.model(FAMILIES["bert"], "mlm")
    with torch.no_grad():
        for layer in teacher.bert.encoder.layer:
            attention = layer.attention.self
            for part in (attention.query, attention.key, attention.value):
                part.weight.view(4, 4, 16)[:, 2:] = 0
                part.bias.view(4, 4)[:, 2:] = 0
    kept = most_important(teacher, Widths(8, 4, 24))
    assert all(units.tolist() == [0, 1, 4, 5, 8, 9, 12, 13] for units in kept.query + kept.value)
    student = narrowed(teacher, Widths(8, 4, 24), "importance")
    before, after = (model.bert.encoder.layer[1].attention.self for model in (teacher, student))
    hidden_LD = torch.zeros(5, 16)
    hidden_LD[:, kept.hidden] = torch.randn(5, 8)

    def scores(attention: torch.nn.Module, hidden: Tensor, size: int) -> Tensor:
        query, key = (part(hidden).view(5, 4, size).transpose(0, 1) for part in (attention.query, attention.key))
        found: Tensor = query @ key.transpose(1, 2) / size**0.5
        return found

    assert torch.allclose(scores(before, hidden_LD, 4), scores(after, hidden_LD[:, kept.hidden], 2), atol=1e-5)


def test_the_largest_heads_stay_and_mpnet_keeps_the_same_in_all_layers() -> None:
    parts = {"bert": ("self.value", "output.dense"), "mpnet": ("attn.v", "attn.o")}
    for family, (value, out) in parts.items():
        teacher = tiny.model(FAMILIES[family], "mlm")
        loud = ((0, 3), (1, 3), (1, 3))
        with torch.no_grad():
            for layer, heads in zip(teacher.base_model.encoder.layer, loud, strict=True):
                for head in heads:
                    layer.attention.get_submodule(value).weight.view(4, 4, 16)[head] *= 10
                    layer.attention.get_submodule(out).weight.view(16, 4, 4)[:, head] *= 10
        heads = [tuple(kept.tolist()) for kept in most_important(teacher, Widths(8, 2, 24)).heads]
        assert heads == (list(loud) if family == "bert" else [(1, 3)] * 3)


# ---- closer than chance


def decaying(task: Task) -> PreTrainedModel:
    """A teacher of which some units hold, read and write more than others, as trained ones do."""
    teacher = tiny.model(BertConfig(**{**SHAPE, "hidden_size": 32, "num_attention_heads": 8}, num_labels=3), task)
    scale_D = torch.linspace(0, 1, 32).square()[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        for weight, bias in layer_norms(teacher):
            weight.copy_(scale_D)
            bias.mul_(scale_D)
        teacher.get_input_embeddings().weight.mul_(scale_D)
    return teacher


@pytest.mark.parametrize("how", ["importance", "svd"])
@pytest.mark.parametrize("task", TASKS)
def test_what_is_kept_is_closer_to_the_teacher_than_fresh_weights(task: Task, how: Narrowing) -> None:
    teacher = decaying(task)
    sizes = Widths(16, 4, 24)
    kept, fresh = (cosine(narrowed(teacher, sizes, start), teacher) for start in (how, "random"))
    assert kept > 0.5
    assert kept > fresh + 0.3


def cosine(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Of the logits of many rows, each less its mean."""
    centred = [found - found.mean(0) for found in (logits(model, 64).flatten(0, -2) for model in (student, teacher))]
    return float(torch.nn.functional.cosine_similarity(*centred, dim=-1).mean())


def test_svd_keeps_a_quarter_of_unlike_units_and_the_main_directions_of_the_rest() -> None:
    teacher = tiny.model(FAMILIES["bert"], "mlm")
    with torch.no_grad():
        for weight, bias in layer_norms(teacher):
            weight.fill_(1)
            bias.zero_()
            weight[[3, 7]] = 5
    table_VD = teacher.get_input_embeddings().weight.detach()
    assert unlike_units(teacher).nonzero().flatten().tolist() == [3, 7]
    found_VE = narrowed(teacher, Widths(8, 2, 24), "svd").get_input_embeddings().weight.detach()
    assert torch.equal(found_VE[:, :2], table_VD[:, [3, 7]])
    rest = [unit for unit in range(16) if unit not in (3, 7)]
    singular = torch.linalg.svdvals(table_VD[:, rest])
    assert torch.allclose(found_VE[:, 2:].norm(dim=0), singular[:6], rtol=1e-4)
    by_importance_VE = narrowed(teacher, Widths(8, 2, 24), "importance").get_input_embeddings().weight
    assert found_VE.square().sum() > by_importance_VE.square().sum()


# ---- what cannot be


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"hidden_size": 32}, "student.hidden_size: expected at most the teacher's 16, got 32: lower it"),
        ({"num_heads": 8}, "student.num_heads: expected at most the teacher's 4, got 8: lower it"),
        ({"ffn_size": 25}, "student.ffn_size: expected at most the teacher's 24, got 25: lower it"),
        ({"hidden_size": 10}, "student.hidden_size: expected a multiple of the teacher's head size 4, got 10: change"),
        ({"hidden_size": 10, "num_heads": 3}, "student.hidden_size: expected a multiple of the student's 3 heads, got"),
        ({"num_heads": 2}, "student.num_heads: expected heads of at most the teacher's size 4, got 16 / 2, since all"),
        ({"hidden_size": 12, "num_heads": 2}, "student.num_heads: expected heads of at most the teacher's size 4"),
    ],
)
def test_sizes_that_do_not_agree(keys: dict[str, int], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_student(StudentConfig(**keys), FAMILIES["bert"])
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DebertaV2Config(**SHAPE), "expected a teacher of type bert, .*, got deberta-v2: leave hidden_size, num_heads"),
        (tiny.FAMILIES["electra"], "expected a teacher whose embeddings are as wide as its layers .*, got 8 and 16"),
    ],
)
def test_families_that_cannot_be_narrowed(config: PreTrainedConfig, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        check_student(StudentConfig(ffn_size=8), config)
