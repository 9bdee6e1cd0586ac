"""What a task's distillation is unless the file says otherwise. `raydistil bench fidelity` measures it."""

from typing import Any

from raydistil.types import Task

Tree = dict[str, Any]

# Task distillation of texts made anew in every epoch. A student of the first layers as they were before the fine-tuning
# (which follow on each other as they always did) first learns what the checkpoint's layers did from there on; then,
# below the fine-tuned head, soft labels and hidden states.
CLASSIFICATION: Tree = {
    "student": {"start": "checkpoint", "rule": "first"},
    "distill": {
        "epochs": 6,
        "lr": 3e-4,
        "warmup_share": 0.1,
        "dropout": 0.0,
        "loss": {"kd": 5.0, "temperature": 1.0, "task": 0.5, "cosine": 0.0, "hidden": {"weight": 1.0}},
        "augment": {},
        "general": {"epochs": 6},
    },
}
# The same of numbers, whose soft labels are compared as they are.
_NUMBERS: Tree = {"kd": 5.0, "divergence": "mse", "task": 0.5, "cosine": 0.0, "hidden": {"weight": 1.0}}
REGRESSION: Tree = {**CLASSIFICATION, "distill": {**CLASSIFICATION["distill"], "loss": _NUMBERS}}
# DistilBERT's sum (Sanh et al. 2019, arXiv:1910.01108, and the weights of the published training): loss.triple.
TRIPLE: Tree = {"kd": 5.0, "temperature": 2.0, "kd_positions": "all", "task": 2.0, "cosine": 1.0}
RECIPES: dict[Task, Tree] = {"classification": CLASSIFICATION, "regression": REGRESSION, "mlm": {}}


def over_recipe(tree: Tree) -> Tree:
    """`tree` with the recipe of its task below it, in the sections it has, and of its loss if that goes by a name."""
    recipe = next((recipe for task, recipe in RECIPES.items() if task == tree.get("task")), {})
    if _is_section(tree, "student") and "num_layers" not in tree["student"]:
        recipe = {name: {key: v for key, v in part.items() if key != "rule"} for name, part in recipe.items()}
    if _named_triple(tree):
        recipe = {**recipe, "distill": _over(recipe.get("distill", {}), {"loss": TRIPLE})}
    over = {**tree, **{name: _over(part, tree[name]) for name, part in recipe.items() if _is_section(tree, name)}}
    loss, chain = over["distill"].get("loss") if _is_section(over, "distill") else None, over.get("assistants")
    if isinstance(loss, dict) and isinstance(chain, list):
        over["assistants"] = [_with_loss(assistant, loss) for assistant in chain]
    return over


def _with_loss(assistant: Any, loss: Tree) -> Any:
    """An assistant that says something of its loss has the rest of it as the student does."""
    if not isinstance(assistant, dict) or not _is_section(assistant, "loss"):
        return assistant
    return assistant | {"loss": _over(loss, assistant["loss"])}


def _named_triple(tree: Tree) -> bool:
    loss = tree["distill"].get("loss") if _is_section(tree, "distill") else None
    return isinstance(loss, dict) and loss.get("triple") is True


def _over(recipe: Tree, tree: Tree) -> Tree:
    """`tree`, with what it does not say taken from `recipe`."""
    merged = recipe | tree
    shared = [name for name, part in recipe.items() if isinstance(part, dict) and _is_section(tree, name)]
    return merged | {name: _over(recipe[name], tree[name]) for name in shared}


def _is_section(tree: Tree, name: str) -> bool:
    return isinstance(tree.get(name), dict)
