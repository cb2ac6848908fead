"""Ladders' records as the forecast reads them, with differences of recipes named by leaf."""

from pathlib import Path

from jaxmoe.errors import UserError
from jaxmoe.forecast.ladder import Ladder, read_ladder
from jaxmoe.ladder.records import RECORDS, read_records

__all__ = ["file_of", "open_ladder"]


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
            keys = sorted(k for k in {*before, *own} if before.get(k) != own.get(k))
            named = "; ".join(f"{k}: {before.get(k)!r} and {own.get(k)!r}" for k in keys)
            raise UserError(
                f"{place}: rungs {first['rung']} and {row['rung']} are not of one recipe"
                f" ({named}); VARIES of a family names what its dial turns"
            )
    return read_ladder([file_of(place) for place in places])
