"""How large a model is and what a token costs, from its shape alone: the meta device, which stores nothing, will do."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raydistil.models import num_parameters

# Parts outside the encoder that see one token of a row: a class head, and the pooler below it.
ONCE_A_ROW = ("classifier", "pre_classifier", "pooler", "head")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Tied parameters count once. `flops_per_token`: of the forward pass of a full row of `length` tokens."""

    parameters: int
    embedding_parameters: int  # words, positions, token types
    bytes: int  # of the weights as they are stored
    length: float
    flops_per_token: float

    def line(self) -> str:
        """The figures as a person reads them."""
        return (
            f"{self.parameters / 1e6:.1f} M parameters ({self.embedding_parameters / 1e6:.1f} M embeddings), "
            f"{self.bytes / 2**20:.0f} MiB, {self.flops_per_token / 1e9:.3g} GFLOPs/token"
        )


def describe_model(model: PreTrainedModel, length: float) -> ModelSize:
    """The size of `model`, and its forward FLOPs a token in rows of `length` = L tokens without padding.

    A product of [m, k] and [k, n] is 2 m n k: so every matrix of n weights costs 2 n a token, and a layer's attention,
    scores and their use, 4 L D with D = heads * head size. Every head is counted where it is applied: a masked-LM head
    at every token, a class head (with its pooler) once a row, that is 2 n / L. Embeddings are looked up: nothing.
    Element-wise work and DeBERTa's products with relative positions are left out; causal and local attention count in
    full, as plain matrix products do them.
    """
    attention = 4 * length * _attention_width(model.config) * model.config.num_hidden_layers
    matrices = sum(
        2 * part.weight.numel() / (length if _once_a_row(model, name) else 1)
        for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)
    )  # fmt: skip
    return ModelSize(
        parameters=num_parameters(model),
        embedding_parameters=num_parameters(_Embeddings(model)),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        length=length,
        flops_per_token=attention + matrices,
    )


def forward_flops(model: PreTrainedModel, length: float, compared: float) -> float:
    """A token's, of a model whose vocabulary head, if it has one, is applied at a share `compared` of the tokens."""
    bare: Any = model.base_model
    whole, layers = (describe_model(part, length).flops_per_token for part in (model, bare))
    return layers + compared * (whole - layers)


class _Embeddings(nn.Module):
    """The tables of a model, so that shared ones count once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tables = nn.ModuleList(part for part in model.modules() if isinstance(part, nn.Embedding))


def _attention_width(config: Any) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * config.num_attention_heads)


def _once_a_row(model: PreTrainedModel, name: str) -> bool:
    """Of a sequence classifier: what stands outside its encoder, and the pooler, which may stand inside."""
    inside = f"{model.base_model_prefix}."
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return ".pooler." in f".{name}."
    parts = name.removeprefix(inside).split(".")
    return "pooler" in parts if name.startswith(inside) else parts[0] in ONCE_A_ROW
