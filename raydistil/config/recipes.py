"""What a task's distillation is unless the file says otherwise. `raydistil bench fidelity` measures it."""

from typing import Any

from raydistil.types import Task

Tree = dict[str, Any]

# Task distillation, of texts made anew in every epoch. A student of the first layers as they were before fine-tuning
# (which follow on each other as they always did) first learns what the checkpoint's layers did from there on; then,
# below the fine-tuned head, hidden states lead and soft labels, whose T^2 their weight takes back, follow. Labels are
# left out: what the teacher made of them is in the others.
CLASSIFICATION: Tree = {
    "student": {"start": "checkpoint", "rule": "first"},
    "distill": {
        "epochs": 6,
        "lr": 3e-4,
        "warmup_share": 0.1,
        "dropout": 0.0,
        "loss": {"kd": 1 / 64, "temperature": 8.0, "task": 0.0, "cosine": 0.0, "hidden": {"weight": 1.0}},
        "augment": {},
        "general": {"epochs": 6},
    },
}
# The same of numbers, whose soft labels are compared as they are.
_NUMBERS: Tree = {"kd": 5.0, "divergence": "mse", "task": 0.5, "cosine": 0.0, "hidden": {"weight": 1.0}}
REGRESSION: Tree = {**CLASSIFICATION, "distill": {**CLASSIFICATION["distill"], "loss": _NUMBERS}}
# DistilBERT's sum (Sanh et al. 2019, arXiv:1910.01108, and the weights of the published training): loss.triple.
TRIPLE: Tree = {"kd": 5.0, "temperature": 2.0, "kd_positions": "all", "task": 2.0, "cosine": 1.0}
# Words' and answers' places do not survive augmenting.
PLACES: Tree = {
    **CLASSIFICATION, "distill": {name: part for name, part in CLASSIFICATION["distill"].items() if name != "augment"},
}  # fmt: skip
# Vectors of length 1: the mean over D of their squared distance is 2 (1 - cos) / D. The layers follow the teacher's.
VECTORS: Tree = {
    "distill": {
        "epochs": 6, "lr": 3e-4, "warmup_share": 0.1, "dropout": 0.0,
        "loss": {"kd": 1000.0, "divergence": "mse", "task": 0.0, "cosine": 0.0, "hidden": {"weight": 1.0}},
    },
}  # fmt: skip
RECIPES: dict[Task, Tree] = {
    "classification": CLASSIFICATION, "regression": REGRESSION, "token_classification": PLACES,
    "question_answering": PLACES, "embedding": VECTORS, "mlm": {},
}  # fmt: skip


def over_recipe(tree: Tree) -> Tree:
    """`tree` with the recipe of its task below it, in the sections it has, and of each loss that goes by a name."""
    recipe = next((recipe for task, recipe in RECIPES.items() if task == tree.get("task")), {})
    over = {**tree, **{name: _over(part, tree[name]) for name, part in recipe.items() if _is_section(tree, name)}}
    if _is_section(tree, "student"):
        over["student"] = _with_rule(tree["student"], recipe)
    if _is_section(over, "distill"):
        over["distill"] = _with_loss(over["distill"], recipe)
    if isinstance(tree.get("assistants"), list):
        over["assistants"] = [_assistant(one, recipe) if isinstance(one, dict) else one for one in tree["assistants"]]
    return over


def _assistant(assistant: Tree, recipe: Tree) -> Tree:
    """A loss of its own has the task's recipe below it, as the student's has."""
    ruled = _over({"rule": recipe["student"]["rule"]}, assistant) if _counts_layers(assistant, recipe) else assistant
    return _with_loss(ruled, recipe)


def _with_rule(student: Tree, recipe: Tree) -> Tree:
    """What a recipe says of the student; its rule only where there is something to choose."""
    own: Tree = recipe.get("student", {})
    return _over(own if _counts_layers(student, recipe) else {k: v for k, v in own.items() if k != "rule"}, student)


def _counts_layers(section: Tree, recipe: Tree) -> bool:
    return "num_layers" in section and "rule" in recipe.get("student", {})


def _with_loss(section: Tree, recipe: Tree) -> Tree:
    """`section` with its loss, if it has one, over the recipe's, or over the one that it names."""
    if not _is_section(section, "loss"):
        return section
    named = TRIPLE if section["loss"].get("triple") is True else {}
    return section | {"loss": _over(recipe.get("distill", {}).get("loss", {}) | named, section["loss"])}


def _over(recipe: Tree, tree: Tree) -> Tree:
    """`tree`, with what it does not say taken from `recipe`."""
    merged = recipe | tree
    shared = [name for name, part in recipe.items() if isinstance(part, dict) and _is_section(tree, name)]
    return merged | {name: _over(recipe[name], tree[name]) for name in shared}


def _is_section(tree: Tree, name: str) -> bool:
    return isinstance(tree.get(name), dict)
