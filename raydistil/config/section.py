"""What every section of the configuration is."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from raydistil.processor import fast_precision
from raydistil.types import Precision

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _resolved(given: object) -> object:
    if given not in ("auto", "float32", "bfloat16"):
        raise ValueError("expected auto, float32 or bfloat16")
    return fast_precision() if given == "auto" else given


FastPrecision = Annotated[Precision, BeforeValidator(_resolved)]


class Section(BaseModel):
    """Frozen; no unknown keys; docstrings stand under the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def refuse_idle(self, keys: dict[str, str]) -> None:
        """Raise ValueError for a key with a value of its own that nothing would look at; `keys`: what each is of."""
        for key, owner in keys.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of {owner}: set that too, or leave it out")
