"""What is served, and what crosses the wire: requests, replies, errors and their limits.

Requests are strict: no unknown field, no number written as a string. Every reply that is not 2xx is an ErrorReply.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from raydistil.serve.texts import Given, Truncate
from raydistil.types import Task

LATEST_MS = 10_000.0  # that an answer may take, where the request does not say
WAY = 0.1  # of that time, for the way to the model and back
MAX_BODY_BYTES = 1 << 20
MAX_INPUTS = 64  # of one request
MAX_MASKS = 1024  # of one request: each costs a row of float32 logits over the vocabulary, 120 kB for BERT's
MAX_CANDIDATES = 100  # of one mask

MAX_ANSWERS = 20  # to one question
MAX_WINDOWS = 64  # of one context

ROUTES: dict[Task, str] = {
    "classification": "/v1/classify", "regression": "/v1/score", "token_classification": "/v1/tokens/classify",
    "question_answering": "/v1/answer", "embedding": "/v1/embeddings", "mlm": "/v1/fill-mask",
}  # fmt: skip

# What a replica runs with; `auto`: the fastest that is exact.
Wish = Literal["auto", "torch", "packed", "onnx", "mixed", "bf16", "int8"]

ErrorType = Literal[
    "malformed_json", "malformed_header", "not_found", "wrong_task", "method_not_allowed", "body_too_large",
    "too_many_inputs", "too_many_masks", "empty_input", "missing_field", "unknown_field", "wrong_type", "invalid_value",
    "too_long", "no_mask", "unauthorized", "rate_limited", "overloaded", "deadline_exceeded", "stopping", "unavailable",
    "internal",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A model on disk, known to be whole."""

    name: str
    directory: str
    task: Task
    mask_token: str | None  # None: not a masked-LM, or not written down
    report: dict[str, Any] | None  # measured by `raydistil evaluate`; None: nothing was
    version: str  # SHA-256 of its configuration, tokenizer and weights
    kept: str | None = None  # a copy of the directory, which replicas load: something else may be exported there
    backend: Wish = "auto"
    keys: tuple[tuple[str, str, float | None], ...] = ()  # name, hash and requests a second of each; none: anybody


def within_s(by_ms: float) -> float:
    """Of an answer that is wanted in so many milliseconds, the seconds that the model has."""
    return (1 - WAY) * by_ms / 1000


# ---- requests


def _as_list(value: object) -> object:
    """One text, or pair, as a list of one. Checked before the items are, so that a long list costs nothing."""
    if isinstance(value, str | dict):
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


# No lone surrogate, which no JSON that is UTF-8 has, and something but spaces.
SOME_TEXT: dict[str, Any] = {"type": "string", "minLength": 1, "pattern": r"\S"}
Text = Annotated[str, AfterValidator(_readable), WithJsonSchema(SOME_TEXT)]
ONE_OR_MANY: dict[str, Any] = {
    "anyOf": [SOME_TEXT, {"type": "array", "items": SOME_TEXT, "minItems": 1, "maxItems": MAX_INPUTS}],
    "title": "Inputs",
}


class TextPair(BaseModel):
    """Two texts that are classified together."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Text
    text_pair: Text


def _kind(value: object) -> str:
    return "pair" if isinstance(value, dict | TextPair) else "single"


# Errors leave the tags out of a field's name.
TextOrPair = Annotated[Annotated[Text, Tag("single")] | Annotated[TextPair, Tag("pair")], Discriminator(_kind)]
PAIR: dict[str, Any] = {
    "type": "object", "properties": {"text": SOME_TEXT, "text_pair": SOME_TEXT}, "required": ["text", "text_pair"],
    "additionalProperties": False, "title": "TextPair",
}  # fmt: skip
EITHER = {"anyOf": [SOME_TEXT, PAIR]}
TEXTS_OR_PAIRS: dict[str, Any] = {
    "anyOf": [SOME_TEXT, PAIR, {"type": "array", "items": EITHER, "minItems": 1, "maxItems": MAX_INPUTS}],
    "title": "Inputs",
}


def _whole(value: object) -> object:
    """1.0 is a whole number in JSON; "1" is none."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Cut(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    truncate: Truncate = "right"
    """A text longer than the model takes is cut at its end, at its beginning (`left`), or refused (`error`)."""


class TextRequest(Cut):
    inputs: Annotated[list[Text], BeforeValidator(_as_list), WithJsonSchema(ONE_OR_MANY)]
    """One text, or a list of texts."""


class PairRequest(Cut):
    inputs: Annotated[list[TextOrPair], BeforeValidator(_as_list), WithJsonSchema(TEXTS_OR_PAIRS)]
    """One text or pair of texts, or a list of them."""

    def given(self) -> list[Given]:
        return [each if isinstance(each, str) else (each.text, each.text_pair) for each in self.inputs]


class ScoreRequest(PairRequest):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": [{"text": "A cat sleeps.", "text_pair": "An animal rests."}]}]}
    )


class ClassifyRequest(PairRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["Good.", "Not good."], "top_k": 2}]})

    top_k: Annotated[int, Field(ge=1), BeforeValidator(_whole)] | None = None
    """Labels to list, best first; null or more than there are: all."""
    raw: bool = False
    """Scores as the model's logits, not as probabilities."""


class FillMaskRequest(TextRequest):
    top_k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES), BeforeValidator(_whole)] = 5
    """Candidates to list for each mask, best first."""


class TokensRequest(TextRequest):
    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": "Ada Lovelace lived in London."}]})


class EmbeddingsRequest(BaseModel):
    """As OpenAI's clients send it."""

    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"input": ["A text.", "Another one."]}]},
    )  # fmt: skip

    input: Annotated[list[Text], BeforeValidator(_as_list), WithJsonSchema(ONE_OR_MANY)]
    """One text, or a list of texts."""
    model: str | None = None
    """Any name: there is one model."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: of little-endian float32."""
    user: str | None = None
    """Not looked at."""
    truncate: Truncate = "right"
    """A text longer than the model takes is cut at its end, at its beginning (`left`), or refused (`error`)."""


class AnswerRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True,
        json_schema_extra={"examples": [{"question": "Where?", "context": "Ada Lovelace lived in London."}]},
    )  # fmt: skip

    question: Text
    context: Text
    """Where the answer stands; however long, it is read in windows."""
    top_k: Annotated[int, Field(ge=1, le=MAX_ANSWERS), BeforeValidator(_whole)] = 1
    """Answers to list, best first; none of them lies within a better one."""


# ---- replies


class LabelScore(BaseModel):
    label: str
    score: float


class Classified(LabelScore):
    """The best label of one input; `tokens` counts what the model read, special ones included."""

    scores: list[LabelScore]
    tokens: int
    truncated: bool
    escalated: bool = False  # whether the teacher answered, since the student was not sure (serve --cascade)


class ClassifyReply(BaseModel):
    model: str
    results: list[Classified]


class Scored(BaseModel):
    """The number of one input, as it was trained; `tokens` counts what the model read, special ones included."""

    score: float
    tokens: int
    truncated: bool


class ScoreReply(BaseModel):
    model: str
    results: list[Scored]


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


class Entity(BaseModel):
    """What was found in one input: `text` is inputs[n][start:end]."""

    label: str
    score: float  # the mean probability of its words' classes
    start: int
    end: int
    text: str


class Tagged(BaseModel):
    entities: list[Entity]
    tokens: int
    truncated: bool


class TokensReply(BaseModel):
    model: str
    results: list[Tagged]


class Answer(BaseModel):
    """`text` is context[start:end]; `score` the sum of the logits of its first and last token."""

    text: str
    score: float
    start: int
    end: int


class AnswerReply(BaseModel):
    model: str
    answers: list[Answer]
    lacking: float  # the score of there being no answer: higher than the best one's, if the model was taught such
    windows: int
    tokens: int
    truncated: bool  # whether the question was cut, to half of a window


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: list[bool]  # of each input


Asked = ClassifyRequest | ScoreRequest | TokensRequest | AnswerRequest | EmbeddingsRequest | FillMaskRequest
Reply = ClassifyReply | ScoreReply | TokensReply | AnswerReply | EmbeddingsReply | FillMaskReply


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["raydistil"] = "raydistil"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Info(BaseModel):
    model: str
    version: str  # SHA-256 of its configuration, tokenizer and weights
    task: Task
    labels: list[str] | None  # null where there are no classes
    mask_token: str | None  # null but for a masked-LM
    backend: str  # what runs it: the fastest of those there are, see `texts_s`
    texts_s: dict[str, float]  # texts a second of each, measured when the replica started
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
