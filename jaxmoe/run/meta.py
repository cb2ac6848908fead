"""What a checkpoint says beside its arrays: read and looked at before anything is made of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from jaxmoe.config_types import Natural
from jaxmoe.errors import UserError
from jaxmoe.outside import json_object

__all__ = ["checked", "read"]

Pair = Annotated[list[float], Field(min_length=2, max_length=2)]  # step, loss
Triple = Annotated[list[float], Field(min_length=3, max_length=3)]  # step, loss, norm


class _Strict:
    __pydantic_config__ = ConfigDict(strict=True)  # other keys may come


@dataclass(frozen=True, kw_only=True)
class _Code(_Strict):
    bits: dict[str, float]
    tokens: dict[str, Natural]
    known: bool


@dataclass(frozen=True, kw_only=True)
class _Guard(_Strict):
    good: list[Triple]
    bad: list[Natural]
    skipped: Natural


@dataclass(frozen=True, kw_only=True)
class _Meta(_Strict):
    """As Parts.save writes it; those with a default came later."""

    step: Natural
    position: Natural
    forecast: list[Pair]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    config: dict[str, Any]
    tokens: Natural = 0
    register: dict[str, Any] | None = None
    spikes: list[list[float]] = Field(default_factory=list)
    closely: Natural = 0
    guard: _Guard | None = None
    code: _Code = Field(default_factory=lambda: _Code(bits={}, tokens={}, known=False))


_ADAPTER = TypeAdapter(_Meta)


def checked(meta: Any) -> dict[str, Any]:
    """The same, if every value is of its type; steps of losses are whole numbers.

    Raises:
        ValueError: it is not what a checkpoint says; with the first key that is wrong.
    """
    try:
        found = _ADAPTER.validate_json(json.dumps(meta))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"its meta: {where}: {first['msg']}") from None
    mesh = meta["config"].get("mesh")
    rounds = mesh.get("rounds", 1) if isinstance(mesh, Mapping) else None
    if type(rounds) is not int or rounds < 1:
        raise ValueError("its meta: config.mesh.rounds is no number of rounds")
    steps = [row[0] for row in (*found.forecast, *(found.guard.good if found.guard else ()))]
    if not all(step.is_integer() and step >= 0 for step in steps):
        raise ValueError("its meta: a loss of no step")
    return meta


def read(checkpoint: Path) -> dict[str, Any]:
    """Of a checkpoint's folder. Raises UserError."""
    try:
        return checked(json_object(checkpoint / "meta" / "metadata"))
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}; take another checkpoint") from None
