"""Defaults by task: below what the file says, and only in the sections it has."""

from raydistil.config import config_of
from raydistil.config.recipes import CLASSIFICATION, over_recipe

BASE = {"corpus": {"source": "x.jsonl"}, "teacher": {"model": "t"}, "student": {"num_layers": 3}, "distill": {}}


def test_task_distillation_has_its_recipe() -> None:
    config = config_of(BASE | {"task": "classification"})
    assert config.distill is not None
    assert config.distill.augment is not None
    assert config.distill.loss.hidden is not None
    assert (config.distill.epochs, config.distill.loss.cosine) == (6, 0)
    assert (config.student.start, config.student.rule) == ("checkpoint", "first")
    listed = config_of({**BASE, "task": "classification", "student": {"layers": [0, 2]}})
    assert (listed.student.start, listed.student.rule) == ("checkpoint", "uniform")
    assert config.distill.general.epochs == 6


def test_language_models_keep_distilberts() -> None:
    config = config_of(BASE | {"task": "mlm"})
    assert config.distill is not None
    assert config.distill.augment is None
    assert config.distill.general.epochs == 0
    loss = config.distill.loss
    assert (loss.kd, loss.task, loss.cosine, loss.hidden) == (5, 2, 1, None)


def test_the_file_wins_key_by_key() -> None:
    tree = BASE | {"task": "classification", "distill": {"epochs": 2, "loss": {"cosine": 1, "hidden": {"weight": 0}}}}
    config = config_of(tree)
    assert config.distill is not None
    assert (config.distill.epochs, config.distill.lr) == (2, CLASSIFICATION["distill"]["lr"])
    assert (config.distill.loss.cosine, config.distill.loss.kd) == (1, CLASSIFICATION["distill"]["loss"]["kd"])
    assert config.distill.loss.weights()["hidden"] == 0


def test_an_assistant_has_the_recipe_below_a_loss_of_its_own() -> None:
    own = {"num_layers": 4, "loss": {"kd": 1, "hidden": {"layers": [[6, 4]]}}}
    distill = {"loss": {"task": 0.25, "hidden": {"weight": 3}}}
    config = config_of({**BASE, "task": "classification", "distill": distill, "assistants": [own, {"num_layers": 3}]})
    first, second, last = (train.loss for train in config.trainings())
    assert first.hidden is not None and last.hidden is not None
    assert (first.kd, first.task, first.cosine, first.temperature) == (1, 0, 0, 8)
    assert (first.hidden.layers, first.hidden.weight) == (((6, 4),), 1)
    assert (last.hidden.weight, last.task, last.kd) == (3, 0.25, 1 / 64) and second == last
    assert [one.rule for one in config.assistants] == ["first", "first"]


def test_an_assistant_may_have_the_triple_loss_and_the_student_another() -> None:
    chain = [{"num_layers": 4, "loss": {"triple": True, "cosine": 3}}, {"layers": [0], "loss": {"triple": False}}]
    loss = {"divergence": "jensen_shannon", "beta": 0.3}
    config = config_of({**BASE, "task": "mlm", "distill": {"loss": loss}, "assistants": chain})
    triple, plain, last = (train.loss for train in config.trainings())
    assert (triple.kd, triple.temperature, triple.kd_positions, triple.cosine) == (5, 2, "all", 3)
    assert (plain.divergence, plain.kd_positions, last.beta) == ("forward_kl", "masked", 0.3)
    assert [one.rule for one in config.assistants] == ["uniform", "uniform"]


def test_a_section_that_is_not_there_stays_away() -> None:
    assert config_of({**BASE, "task": "classification", "distill": {}}).finetune is None
    without = {name: part for name, part in BASE.items() if name != "distill"}
    assert config_of({**without, "task": "classification"}).distill is None


def test_trees_that_are_no_trees_are_left_to_the_validation() -> None:
    for tree in ({"task": "classification", "distill": 5}, {"task": ["mlm"]}, {}, {"task": "classification"}):
        assert over_recipe(tree) == tree
