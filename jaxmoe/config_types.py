"""Types and strictness that all of the config's parts share."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

__all__ = ["LATER", "Fraction", "Natural", "NonNegative", "Positive", "Strict"]

LARGEST = 2**53  # beyond it a float no longer counts by ones
Positive = Annotated[int, Field(gt=0, lt=LARGEST)]
Natural = Annotated[int, Field(ge=0, lt=LARGEST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]

# Metadata of a field that came when fingerprints were out in the world, in registers and records:
# they do not count it while it says what it says by default. So a new knob changes none of them.
LATER: dict[str, Any] = {"later": True}


class Strict:
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
