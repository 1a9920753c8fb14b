"""What every block of a config has in common: no unknown keys, no wrong types, mistakes in the words of the file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


def impossible(message: str) -> PydanticCustomError:
    """An error for values that do not go together; `message` begins with the key."""
    # PydanticCustomError formats with {}; the message is final already.
    return PydanticCustomError("impossible", "{message}", {"message": message})


class Strict(BaseModel):
    """A block of a config."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def changed(model: BaseModel, *keys: str) -> list[str]:
    """Those of `keys` that differ from their defaults; a config.resolved.json names them all."""
    return [key for key in keys if getattr(model, key) != type(model).model_fields[key].default]
