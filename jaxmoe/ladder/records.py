"""records.jsonl: one line a finished point of a ladder, read from its run directory.

A line is appended once and never rewritten; a later line of the same key stands.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from jaxmoe import config as config_lib
from jaxmoe.curriculum import curriculum
from jaxmoe.errors import UserError
from jaxmoe.forecast import register
from jaxmoe.ladder.family import recipe, recipe_fingerprint
from jaxmoe.outside import json_object, needed, reading
from jaxmoe.run import record
from jaxmoe.run.target import flops, sizes_of

__all__ = ["RECORDS", "append", "flops", "key", "make", "read_records"]

RECORDS = "records.jsonl"
Key = tuple[str, int, int, int]
NUMBER = (int, float)
NEEDED = {
    **{"family": str, "rung": int, "seed": int, "recipe_fingerprint": str},
    "horizon_tokens": NUMBER,
    **{"params_active": NUMBER, "params_total": NUMBER, "tokens": NUMBER, "flops": NUMBER},
    "loss": (*NUMBER, type(None)),
}


def key(row: Mapping[str, Any]) -> Key:
    """What tells two points apart: family, rung, seed, tokens."""
    return (row["family"], row["rung"], row["seed"], row["horizon_tokens"])


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The standing records of a ladder, in the order in which they were finished.

    Raises:
        UserError: no such ladder, a line that is not JSON, or one that is no record.
    """
    file = folder / RECORDS if folder.is_dir() else folder
    if not file.is_file():
        raise UserError(f"{folder}: no {RECORDS}; python -m jaxmoe.ladder run writes it")
    rows: dict[Key, dict[str, Any]] = {}
    for number, row in enumerate(record.read_lines(file), 1):
        where = f"{file}, line {number}: not a ladder's record"
        needed(row, NEEDED, where)
        if not isinstance(row.get("recipe", {}), dict):
            raise UserError(f"{where}: recipe={row['recipe']!r:.80}; restore the file")
        rows.pop(key(row), None)
        rows[key(row)] = row
    return list(rows.values())


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Adds a record; jobs of one ladder may do so at one time. A line that a kill tore goes."""
    file = folder / RECORDS
    with FileLock(f"{file}.lock"):
        torn = file.read_bytes().rpartition(b"\n")[2] if file.exists() else b""
        with open(file, "ab") as out:
            out.truncate(out.tell() - len(torn))
            out.write(json.dumps(row).encode() + b"\n")


def make(folder: Path, run: Path, place: Mapping[str, Any], varies: Iterable[str]) -> dict:
    """The record of a finished run.

    Args:
        folder: of the ladder; `run` lies in it.
        place: family, rung, seed, and branch_of: (name, step) of the run it was branched off.
        varies: leaves beyond the dial's that the family changes with the rung.
    """
    config = record.read_config(run)
    about = json_object(run / record.ENVIRONMENT)
    with reading(run):
        evals = (run / record.EVALS).read_bytes()
        tokenizer = (run / record.TOKENIZER).read_bytes()
    rows = record.read_lines(run / record.EVALS)
    last = record.finished(run)
    assert last is not None, f"{run} is not finished"
    wanted = {"nll": float, "bits_per_byte": float, "set_fingerprint": str}
    needed(last, wanted, run / record.EVALS)
    sizes, plan = sizes_of(config), curriculum(config)
    leaves = recipe(config, tuple(varies))
    shared = place["branch_of"][1] if place["branch_of"] else 0
    with reading(run / record.EVALS):
        seen = register.observations(
            rows, set_fingerprint=last["set_fingerprint"], until=config.train.steps
        )
    with reading(run / record.ENVIRONMENT):
        data, code = about["data"], about["code"]
        trained, unique = str(data["fingerprint"]), _unique(data, sizes["tokens"])
    return {
        "kind": "rung",
        "family": place["family"],
        "rung": place["rung"],
        "seed": place["seed"],
        "horizon_tokens": sizes["tokens"],
        **sizes,
        "unique_tokens": unique,
        "flops_spent": sizes["flops"] - flops(config, shared),
        "loss": last["nll"],
        "bits_per_byte": last["bits_per_byte"],
        "set": last["set"],
        "set_fingerprint": last["set_fingerprint"],
        "train_fingerprint": trained,
        "tokenizer_fingerprint": _sha256(tokenizer)[:16],
        "recipe_fingerprint": recipe_fingerprint(leaves),
        "recipe": leaves,
        "config_fingerprint": config_lib.fingerprint(config),
        "code": code,
        "evals_sha256": _sha256(evals),
        "run": run.relative_to(folder).as_posix(),
        "branch_of": place["branch_of"][0] if place["branch_of"] else None,
        "curve": [[s, plan.tokens(s), loss] for s, loss in zip(*seen, strict=True)],
        "wall_seconds": _seconds(run),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _unique(data: Mapping[str, Any], tokens: int) -> int:
    """Tokens seen for the first time, over the sources of a mix."""
    mix = data.get("mix") or {}
    if mix:
        return sum(min(used["tokens"], used["epoch"]) for used in mix.values())
    return min(tokens, data["train_tokens"])


def _seconds(run: Path) -> float:
    """Of the training loop, over all its starts."""
    rows = record.read_lines(run / record.METRICS)
    return rows[-1]["seconds"] if rows else 0.0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
