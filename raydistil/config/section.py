"""What every section of the configuration is."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen; no unknown keys; docstrings stand under the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def refuse_idle(self, keys: dict[str, str]) -> None:
        """Raise ValueError for a key with a value of its own that nothing would look at; `keys`: what each is of."""
        for key, owner in keys.items():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of {owner}: set that too, or leave it out")
