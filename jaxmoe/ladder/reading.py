"""Ladders' records as the forecast reads them, with differences of recipes named by leaf."""

from pathlib import Path
from typing import Any

from jaxmoe import config as config_lib
from jaxmoe.config import Config
from jaxmoe.errors import UserError
from jaxmoe.forecast.ladder import Ladder, read_ladder
from jaxmoe.ladder.family import differing
from jaxmoe.ladder.records import RECORDS, read_records

__all__ = ["check_recipe", "file_of", "open_ladder"]


def file_of(place: Path) -> Path:
    """The records of a ladder's folder, or the file itself."""
    return place / RECORDS if place.is_dir() else place


def open_ladder(*places: Path) -> Ladder:
    """Of folders of ladders, or files of records, as one ladder.

    Raises:
        UserError: no records, damaged ones, or ones that are not of one text and one recipe.
    """
    rows = [(place, row) for place in places for row in read_records(place)]
    for place, row in rows:
        first = rows[0][1]
        before, own = first.get("recipe"), row.get("recipe")
        if before and own and row["recipe_fingerprint"] != first["recipe_fingerprint"]:
            named = "; ".join(f"{k}: {x!r} and {y!r}" for k, x, y in differing(before, own))
            raise UserError(
                f"{place}: rungs {first['rung']} and {row['rung']} are not of one recipe"
                f" ({named}); VARIES of a family names what its dial turns"
            )
    return read_ladder([file_of(place) for place in places])


def check_recipe(ladder: Ladder, config: Config) -> None:
    """Raises UserError where a target is not of the ladder's recipe, and names the leaves."""
    known = ladder.rows[0].get("recipe") or {}
    tree = config_lib.as_dict(config)
    named = "; ".join(
        f"{k}: {x!r} and {y!r}" for k, x, y in differing(known, {k: _at(tree, k) for k in known})
    )
    if named:
        raise UserError(
            f"the target {config.name} is not of the ladder's recipe ({named}): its loss would not"
            " be that of a larger rung; VARIES of a family names what its dial turns"
        )


def _at(tree: Any, key: str) -> Any:
    """The value of a dotted key; None below a part that is None."""
    for word in key.split("."):
        tree = tree.get(word) if isinstance(tree, dict) else None
    return tree
