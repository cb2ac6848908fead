"""The register of forecasts: append-only JSON lines, each carrying the SHA-256 of the one before.

`forecasts.jsonl` holds the lines and `forecasts.head.json` their count and the hash of the last
one, written after it. Together they show any edited, removed, added, moved or torn line, except
that whoever rewrites every line *and* the anchor can forge all of it: publish the head (print
it in a log, mail it) to close that door. Right after a kill the anchor may be one line behind; that
is no error, and the next `append` mends it. Each checkpoint of the run holds the count and hash of
its moment too: a register that was replaced as a whole, anchor included, does not contain them.

A correction is a new forecast with `corrects` (index of the line) and `reason`; both are scored.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.forecast.register_beside import (
    checkpoint_heads,
    eval_problem,
    observations,
    parsed,
    postdated,
    read_evals,
    run_problems,
)
from jaxmoe.outside import loads

__all__ = [
    "FORECASTS",
    "METRIC",
    "Problem",
    "anchor_path",
    "append",
    "contains",
    "head",
    "observations",
    "read",
    "read_evals",
    "repair_torn",
    "verify",
]

ZEROS = "0" * 64
LEVELS = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
COMMON = ("config", "set", "set_fingerprint", "target_step", "target_tokens", "loss")
# The training text that the set was compared with, and documents of it that repeat the set.
COMPARED = ("train_fingerprint", "leaking")
# Where and when it was made, of what it speaks, and all that it rests on.
MADE = (
    *("step", "tokens", "cutoff_step", "cutoff_tokens", "horizon_steps", "metric", "schedule"),
    *("code", "siblings", "law", "laws", "observations_sha256"),
)
PASSES = ("tasks_sha256", "flops", "buckets")
FIELDS = {
    "forecast": (*COMMON, *MADE),
    "outcome": COMMON,
    "pass rates": (*PASSES, "code", "law", "inputs_sha256", "largest_flops"),
    "pass rates outcome": PASSES,
}
CLOSING = ("outcome", "pass rates outcome")
FORECASTS = "forecasts.jsonl"  # of losses; its head is in the run's checkpoints
METRIC = "held-out nats per token"
SET_BY_APPEND = ("index", "previous")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a register. `line` counts from 1; None: the file as a whole."""

    line: int | None
    what: str

    def __str__(self) -> str:
        return self.what if self.line is None else f"line {self.line}: {self.what}"


def anchor_path(path: str | Path) -> Path:
    """`forecasts.jsonl` -> `forecasts.head.json`."""
    return Path(path).with_suffix(".head.json")


def append(path: str | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Adds one line (flushed, fsynced), then moves the anchor. Returns the object written.

    `index` and `previous` are filled in here, and `time` (UTC, ISO 8601) where it is missing.

    Raises:
        UserError: fields are missing or senseless, what a forecast rests on is later than its
            cut-off, the register is closed by an outcome, or it is damaged; a damaged register is
            never extended.
    """
    path = Path(path)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = {**record, "time": record.get("time", now)}
    _check_record(record)
    _refuse_look_ahead(path, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two writers would both build on the same last line
        lines, torn = _split(path.read_bytes())
        problems = _chain_problems(lines, torn) + _anchor_problems(path, lines)
        if problems:
            raise UserError(f"{path}: not appending to a damaged register: {problems[0]}")
        if lines and loads(lines[-1])["kind"] in CLOSING:
            raise UserError(f"{path}: closed by the outcome in line {len(lines)}; start a new run")
        _check_correction(record, lines)
        written = {
            "kind": record["kind"],
            "index": len(lines),
            "previous": _sha256(lines[-1]) if lines else ZEROS,
            "time": record["time"],
            **{k: v for k, v in record.items() if k not in ("kind", "time")},
        }
        line = _dump(written)
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
        _write_anchor(path, count=len(lines) + 1, head=_sha256(line))
    return json.loads(line)


def read(path: str | Path) -> list[dict[str, Any]]:
    """All objects of a register, in order. It does not verify the chain.

    Raises:
        UserError: no such file, a torn last line, or a line that is no JSON object.
    """
    path = Path(path)
    lines, torn = _split(_bytes(path))
    if torn:
        raise UserError(
            f"{path}: line {len(lines) + 1} is torn; repair_torn removes it after a kill"
        )
    records = []
    for number, line in enumerate(lines, 1):
        record = parsed(line)
        if record is None:
            raise UserError(f"{path}: line {number} is not a JSON object; run verify")
        records.append(record)
    return records


def verify(path: str | Path, evals: str | Path | None = None) -> list[Problem]:
    """What is wrong with a register; empty when it is sound.

    Args:
        evals: the run's evals.jsonl; None takes the one beside the register, if there is one.

    The schedule, the first start and the checkpoints beside it are compared too, where they are.

    Raises:
        UserError: neither the register nor its anchor exists.
    """
    path = Path(path)
    anchor_only = not path.exists() and anchor_path(path).exists()
    lines, torn = _split(b"" if anchor_only else _bytes(path))
    problems = _chain_problems(lines, torn) + _anchor_problems(path, lines)
    records = [parsed(line) for line in lines]
    beside = Path(evals) if evals is not None else path.with_name("evals.jsonl")
    if evals is not None or beside.exists():
        rows = read_evals(beside)
        for number, record in enumerate(records, 1):
            if record is not None and (what := eval_problem(record, rows)) is not None:
                problems.append(Problem(line=number, what=what))
    problems += [Problem(line=n, what=what) for n, what in run_problems(path.parent, records)]
    problems += _checkpoint_problems(path) if path.name == FORECASTS else []
    return sorted(problems, key=lambda p: math.inf if p.line is None else p.line)


def head(path: str | Path) -> dict[str, Any]:
    """`count` of lines and `head`, the hash of the last one: what a checkpoint keeps."""
    path = Path(path)
    lines = _split(path.read_bytes())[0] if path.exists() else []
    return {"count": len(lines), "head": _sha256(lines[-1]) if lines else ZEROS}


def contains(path: str | Path, known: Any) -> str | None:
    """None if the register holds the line that `head` once told of; else what is wrong."""
    path = Path(path)
    known = known if isinstance(known, dict) else {}
    count, sha256 = known.get("count"), known.get("head")
    if type(count) is not int or not isinstance(sha256, str) or count < 0:
        return f"{known!r} is no line of a register"
    lines = _split(path.read_bytes())[0] if path.exists() else []
    if count > len(lines):
        return f"it had {count} lines, and {path.name} has {len(lines)}: lines were removed"
    if count and _sha256(lines[count - 1]) != sha256:
        return f"line {count} of {path.name} was {sha256[:12]}...: the register was replaced"
    return None


def repair_torn(path: str | Path) -> bool:
    """Removes an incomplete last line that a kill left. Returns whether there was one.

    Raises:
        UserError: the anchor vouches for the torn line, so it is damage, not an unfinished append.
    """
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        data = file.read()
        lines, torn = _split(data)
        if not torn:
            return False
        anchor = _read_anchor(path)
        if anchor is not None and anchor.count > len(lines):
            raise UserError(
                f"{path}: line {len(lines) + 1} is torn but was once complete; restore a copy"
            )
        file.truncate(len(data) - len(torn))
        file.flush()
        os.fsync(file.fileno())
    return True


@dataclass(frozen=True, kw_only=True)
class _Anchor:
    count: int
    head: str


def _check_record(record: Mapping[str, Any]) -> None:
    kind = record.get("kind")
    if kind not in FIELDS:
        raise UserError(f"kind={kind!r}: a register holds {' and '.join(FIELDS)}")
    missing = [name for name in FIELDS[kind] if name not in record]
    if missing:
        raise UserError(f"a {kind} needs {', '.join(missing)}; give every field")
    if kind in ("forecast", "outcome"):
        _check_compared(record)
    filled = [name for name in SET_BY_APPEND if name in record]
    if filled:
        raise UserError(f"{', '.join(filled)} is filled in by append; leave it out")
    if kind.startswith("pass rates"):
        _check_passes(record)
        return
    if kind == "forecast":
        _check_made(record)
    loss = record["loss"]
    wanted = list(LEVELS) if kind == "forecast" else ["realised"]
    if not isinstance(loss, Mapping) or sorted(loss) != sorted(wanted):
        raise UserError(f"loss={loss!r} of a {kind} must have exactly {', '.join(wanted)}")
    values = [loss[name] for name in wanted]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise UserError(f"loss={loss!r}: every value must be a finite number of nats per token")
    if values != sorted(values):
        raise UserError(f"loss={loss!r}: quantiles must rise from q05 to q95")


def _check_compared(record: Mapping[str, Any]) -> None:
    """A loss on text that may have been trained on is no forecast's target."""
    text, leaking = (record.get(name) for name in COMPARED)
    if not (isinstance(text, str) and text and type(leaking) is int and leaking >= 0):
        raise UserError(
            f"held-out set {record['set']!r} was not compared with the training text: a"
            f" {record['kind']} needs {' and '.join(COMPARED)}, from python -m jaxmoe.data overlap"
        )


def _check_made(record: Mapping[str, Any]) -> None:
    """Step, tokens and horizon fit each other; hash of the schedule, weights of the laws."""
    cutoff, target = record["cutoff_step"], record["target_step"]
    if not (type(cutoff) is type(target) is int and 0 <= cutoff < target):
        raise UserError(
            f"cutoff_step={cutoff!r}: it must be from 0 to under the target's {target!r}"
        )
    if record["horizon_steps"] != target - cutoff or record["step"] != cutoff:
        raise UserError(
            f"step={record['step']!r}, horizon_steps={record['horizon_steps']!r}: a forecast is"
            f" made at its cut-off, {cutoff}, for {target - cutoff} steps from there"
        )
    if record["metric"] != METRIC:
        raise UserError(f"metric={record['metric']!r}: a register of losses is of {METRIC}")
    plan, laws = record["schedule"], record["laws"]
    if not isinstance(plan, Mapping) or not plan.get("sha256") or plan.get("steps", 0) < target:
        raise UserError(f"schedule={plan!r}: give Schedule.summary() of the whole run")
    if not isinstance(laws, Mapping) or abs(sum(laws.values()) - 1) > 1e-6:
        raise UserError(f"laws={laws!r}: give each law's weight; they add up to 1")
    if not all(isinstance(s, Mapping) and s.get("sha256") for s in record["siblings"]):
        raise UserError("siblings: each needs sha256 of its record, and finished")


def _check_passes(record: Mapping[str, Any]) -> None:
    wanted = list(LEVELS) if record["kind"] == "pass rates" else ["realised"]
    for name, bucket in record["buckets"].items():
        values = [bucket.get(level) for level in wanted]
        if not all(isinstance(v, float) and math.isfinite(v) and v > 0 for v in values):
            raise UserError(f"bucket {name!r}: {bucket!r} needs {', '.join(wanted)}, above 0")
        if values != sorted(values):
            raise UserError(f"bucket {name!r}: quantiles must rise from q05 to q95")


def _check_correction(record: Mapping[str, Any], lines: Sequence[bytes]) -> None:
    if "corrects" not in record:
        return
    index, reason = record["corrects"], record.get("reason")
    known = type(index) is int and 0 <= index < len(lines)
    kind = loads(lines[index])["kind"] if known else None
    if kind != record["kind"]:
        raise UserError(f"corrects={index!r}: no {record['kind']} is there with that index")
    if not isinstance(reason, str) or not reason.strip():
        raise UserError("a correction needs a reason")


def _refuse_look_ahead(path: Path, record: Mapping[str, Any]) -> None:
    """A forecast may rest on nothing later than its cut-off: neither siblings nor evals."""
    if record["kind"] != "forecast":
        return
    if (late := postdated(record)) is not None:
        raise UserError(late)
    evals = path.with_name("evals.jsonl")
    rows = read_evals(evals) if evals.exists() else []
    if rows and (what := eval_problem(record, rows)) is not None:
        raise UserError(what)
    # What the loop makes rests on the evals before its cut-off alone, and a resume may make it when
    # later ones are there. Who brings other inputs could have chosen them with later evals in view.
    cutoff, name = record["cutoff_step"], record["set_fingerprint"]
    later = [row["step"] for row in rows if row["set_fingerprint"] == name and row["step"] > cutoff]
    if later and (record["siblings"] or cutoff == 0):
        raise UserError(
            f"the run has an eval at step {max(later)}, after this forecast's cut-off at step"
            f" {cutoff}: look-ahead; only a later cut-off can be registered"
        )


def _dump(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"record cannot be written as JSON: {error}; use plain finite values"
        ) from None


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Complete lines without their newline, and what is left of an unfinished one."""
    *lines, torn = data.split(b"\n")
    return lines, torn


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a run directory that has one")
    return path.read_bytes()


def _sha256(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _read_anchor(path: Path) -> _Anchor | None:
    """The anchor; None where there is none; count -1 where it cannot be read."""
    file = anchor_path(path)
    if not file.exists():
        return None
    value = (parsed(file.read_bytes()) if file.is_file() else None) or {}
    count, head = value.get("count"), value.get("head")
    if not isinstance(count, int) or not isinstance(head, str):
        return _Anchor(count=-1, head="")
    return _Anchor(count=count, head=head)


def _write_anchor(path: Path, *, count: int, head: str) -> None:
    file = anchor_path(path)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        out.write(_dump({"count": count, "head": head}) + b"\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    with suppress(OSError):  # some network file systems cannot sync a directory
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _checkpoint_problems(path: Path) -> list[Problem]:
    problems = []
    for step, known in checkpoint_heads(path.parent):
        if (wrong := contains(path, known)) is not None:
            problems.append(Problem(line=None, what=f"checkpoint {step}: {wrong}"))
    return problems


def _chain_problems(lines: Sequence[bytes], torn: bytes) -> list[Problem]:
    problems = []
    previous, closed = ZEROS, 0
    for number, line in enumerate(lines, 1):
        record = parsed(line)
        if record is None:
            problems.append(Problem(line=number, what="not a JSON object: edited or damaged"))
        else:
            problems += _line_problems(number, record, previous)
            if closed:
                what = f"follows the outcome of line {closed}, which closed the register"
                problems.append(Problem(line=number, what=what))
            closed = number if record.get("kind") in CLOSING else closed
        previous = _sha256(line)
    if torn:
        what = "torn: it has no end; repair_torn removes it if a kill left it"
        problems.append(Problem(line=len(lines) + 1, what=what))
    return problems


def _line_problems(number: int, record: Mapping[str, Any], previous: str) -> list[Problem]:
    index = record.get("index")
    problems = []
    if index != number - 1:
        what = f"has index {index!r} where {number - 1} belongs: removed, added or moved lines"
        problems.append(Problem(line=number, what=what))
    if record.get("previous") != previous:
        if number == 1:
            what = "its `previous` is not zeros: edited, or lines before it were removed"
        else:
            what = f"its `previous` is not the hash of line {number - 1}: one of them was changed"
        problems.append(Problem(line=number, what=what))
    if record.get("kind") not in [*FIELDS]:  # it may be of any type
        problems.append(Problem(line=number, what=f"unknown kind {record.get('kind')!r}"))
    return problems


def _anchor_problems(path: Path, lines: Sequence[bytes]) -> list[Problem]:
    name, anchor = anchor_path(path).name, _read_anchor(path)
    heads = [ZEROS, *map(_sha256, lines)]
    if anchor is None:
        # A kill after the very first line leaves no anchor yet.
        if len(lines) <= 1:
            return []
        return [Problem(line=None, what=f"{name} is missing: the end of the register is unproven")]
    if anchor.count < 0:
        return [Problem(line=None, what=f"{name} is not an anchor: edited or damaged")]
    if anchor.count > len(lines):
        what = f"{name} counts {anchor.count} lines but there are {len(lines)}: the end was removed"
        return [Problem(line=len(lines) + 1, what=what)]
    if anchor.count < len(lines) - 1:
        what = f"{name} counts {anchor.count} lines but there are {len(lines)}: lines were added"
        return [Problem(line=anchor.count + 1, what=what)]
    if anchor.head != heads[anchor.count]:
        what = f"its hash is not the one in {name}: the line or the anchor was edited"
        return [Problem(line=max(anchor.count, 1), what=what)]
    return []
