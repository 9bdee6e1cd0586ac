"""What is served, and what crosses the wire: requests, replies, errors and their limits.

Requests are strict: no unknown field, no number written as a string. Every reply that is not 2xx is an ErrorReply.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from raydistil.types import Task

MAX_BODY_BYTES = 1 << 20
MAX_INPUTS = 64  # of one request
MAX_MASKS = 1024  # of one request: each costs a row of float32 logits over the vocabulary, 120 kB for BERT's
MAX_CANDIDATES = 100  # of one mask

ROUTES: dict[Task, str] = {"classification": "/v1/classify", "mlm": "/v1/fill-mask"}

ErrorType = Literal[
    "malformed_json", "not_found", "wrong_task", "method_not_allowed", "body_too_large", "too_many_inputs",
    "too_many_masks", "empty_input", "missing_field", "unknown_field", "wrong_type", "invalid_value", "too_long",
    "no_mask", "internal",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk, known to be whole."""

    name: str
    directory: str
    task: Task
    mask_token: str | None  # None: classification, or not written down
    report: dict[str, Any] | None  # measured by `raydistil evaluate`; None: nothing was


# ---- requests


def _as_list(value: object) -> object:
    """One text as a list of one. Checked before the items are, so that a long list costs nothing."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("wrong_type", "expected a text or a list of texts")
    if not value:
        raise PydanticCustomError("empty_input", "expected at least one text, the list is empty")
    if len(value) > MAX_INPUTS:
        context = {"limit": MAX_INPUTS, "count": len(value)}
        raise PydanticCustomError("too_many_inputs", "expected at most {limit} texts, got {count}", context)
    return value


def _readable(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("empty_input", "expected a text, this one is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, no tokenizer reads it
        raise PydanticCustomError("invalid_value", "expected Unicode, this text has a lone surrogate") from error
    return text


Text = Annotated[str, AfterValidator(_readable)]
ONE_OR_MANY = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_INPUTS}],
    "title": "Inputs",
}


class TextRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    inputs: Annotated[list[Text], BeforeValidator(_as_list), WithJsonSchema(ONE_OR_MANY)]
    """One text, or a list of texts."""
    truncate: Literal["right", "error"] = "right"
    """A text longer than the model takes is cut at its end, or refused."""


class ClassifyRequest(TextRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["Good.", "Not good."], "top_k": 2}]})

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Labels to list, best first; null or more than there are: all."""


class FillMaskRequest(TextRequest):
    top_k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 5
    """Candidates to list for each mask, best first."""


# ---- replies


class LabelScore(BaseModel):
    label: str
    score: float


class Classified(LabelScore):
    """The best label of one input; `tokens` counts what the model read, special ones included."""

    scores: list[LabelScore]
    tokens: int
    truncated: bool


class ClassifyReply(BaseModel):
    model: str
    results: list[Classified]


class Candidate(BaseModel):
    token: str
    score: float


class FilledMask(BaseModel):
    candidates: list[Candidate]


class Filled(BaseModel):
    """The masks of one input in its order; `tokens` counts what the model read, special ones included."""

    masks: list[FilledMask]
    tokens: int
    truncated: bool


class FillMaskReply(BaseModel):
    model: str
    results: list[Filled]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Info(BaseModel):
    model: str
    task: Task
    labels: list[str] | None  # null for masked-LM
    mask_token: str | None  # null for classification
    parameters: int
    max_length: int  # tokens, special ones included
    report: dict[str, Any] | None


class ErrorDetail(BaseModel):
    type: ErrorType
    message: str
    param: str | None = None  # the field at fault, such as `inputs[3]`; one text is inputs[0]
    limit: int | None = None


class ErrorReply(BaseModel):
    error: ErrorDetail
