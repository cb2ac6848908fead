"""`python -m jaxmoe.report diff RUN_A RUN_B`: from which step, in which layer two runs differ."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxmoe import config as config_lib
from jaxmoe.errors import UserError
from jaxmoe.outside import json_object, reading
from jaxmoe.run import record

__all__ = ["Differing", "LayerDiff", "RunDiff", "compare", "main"]

SHOWN = 8  # arrays of a step
NUMBERS = ("train/nll", "train/grad_norm")
VERSIONS = ("jaxmoe", "code", "jax", "python", "devices", "mesh")

EXAMPLE = """example:
  python -m jaxmoe.report diff runs/first runs/again
  python -m jaxmoe.train --run-dir runs/again --set health.statistics_every=1   every step's layers

exit codes: 0 nothing differs, 1 something does, 2 a mistake"""


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A number that both runs logged. `step`: the first at which it is not the same bits."""

    name: str
    compared: int
    same_until: int | None  # the last step before; None: there is none
    step: int | None
    values: tuple[float, float] | None
    worst: float  # relative, over all common steps


@dataclass(frozen=True, kw_only=True)
class LayerDiff:
    """An array of a step whose bits differ, in one layer (0 for what is in none).

    Attributes:
        relative: of its root mean square.
    """

    name: str
    layer: int
    relative: float


@dataclass(frozen=True, kw_only=True)
class RunDiff:
    """Attributes:
    config, versions: `key: in the first -> in the second`.
    layers: of the first step at which any differ, in the model's order.
    """

    config: list[str]
    versions: list[str]
    numbers: list[Differing]
    layers_compared: int
    layers_same_until: int | None
    layers_step: int | None
    layers: list[LayerDiff]

    @property
    def same(self) -> bool:
        return self.layers_step is None and all(one.step is None for one in self.numbers)


def compare(first: Path, second: Path) -> RunDiff:
    """Raises UserError where one is no run, or they have no logged step in common."""
    configs = [record.read_config(run) for run in (first, second)]
    rows = [_by_step(run / record.METRICS) for run in (first, second)]
    if not rows[0].keys() & rows[1].keys():
        raise UserError(f"{first} and {second} have no logged step in common")
    with reading(f"{record.METRICS} of {first} and {second}"):
        numbers = [_differing(name, *rows) for name in NUMBERS]
    evals = [_evals(run) for run in (first, second)]
    with reading(f"{record.EVALS} of {first} and {second}"):
        numbers += [
            _differing(name, evals[0][name], evals[1][name])
            for name in evals[0]
            if name in evals[1]
        ]
    steps, same_until, step, layers = _layers(first, second)
    return RunDiff(
        config=config_lib.diff(*configs),
        versions=_versions(first, second),
        numbers=numbers,
        layers_compared=steps,
        layers_same_until=same_until,
        layers_step=step,
        layers=layers,
    )


def _by_step(file: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in record.read_lines(file)}


def _evals(run: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """By "held-out SET", the standing result of each step."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in record.read_lines(run / record.EVALS):
        name = f"held-out {row['set']}"
        found.setdefault(name, {})[row["step"]] = {name: row["nll"]}
    return found


def _differing(
    name: str, first: Mapping[int, Mapping[str, Any]], second: Mapping[int, Mapping[str, Any]]
) -> Differing:
    common = sorted(s for s in first.keys() & second.keys() if name in first[s])
    pairs = {s: (first[s][name], second[s][name]) for s in common if name in second[s]}
    unlike = [s for s, (a, b) in pairs.items() if a != b and not (a != a and b != b)]
    before = [s for s in pairs if not unlike or s < unlike[0]]
    return Differing(
        name=name,
        compared=len(pairs),
        same_until=before[-1] if before else None,
        step=unlike[0] if unlike else None,
        values=pairs[unlike[0]] if unlike else None,
        worst=max((_relative(*pairs[s]) for s in unlike), default=0.0),
    )


def _relative(a: float, b: float) -> float:
    """inf where one of them is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b), sys.float_info.min)


def _layers(first: Path, second: Path) -> tuple[int, int | None, int | None, list[LayerDiff]]:
    rows = [_by_step(run / record.LAYERS) for run in (first, second)]
    common = sorted(rows[0].keys() & rows[1].keys())
    same_until = None
    for step in common:
        arrays = [row[step]["arrays"] for row in rows]
        with reading(f"{record.LAYERS} of {first} and {second}, step {step}"):
            found = [*_unlike(*arrays)]
        if found:
            return len(common), same_until, step, found
        same_until = step
    return len(common), same_until, None, []


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[LayerDiff]:
    for name in first.keys() ^ second.keys():
        yield LayerDiff(name=f"{name} (of one run alone)", layer=0, relative=math.inf)
    for name in (n for n in first if n in second):
        a, b = first[name], second[name]
        if len(a["sum"]) != len(b["sum"]):
            yield LayerDiff(name=name, layer=0, relative=math.inf)
            continue
        for layer, (x, y) in enumerate(zip(a["sum"], b["sum"], strict=True)):
            if x != y:
                relative = _relative(a["rms"][layer], b["rms"][layer])
                yield LayerDiff(name=name, layer=layer, relative=relative)


def _versions(first: Path, second: Path) -> list[str]:
    trees = []
    for run in (first, second):
        file = run / record.ENVIRONMENT
        trees.append(json_object(file) if file.exists() else {})
    found = []
    for name in VERSIONS:
        a, b = (one.get(name) for one in trees)
        if a != b:
            found.append(f"{name}: {a!r} -> {b!r}")
    with reading(f"{record.ENVIRONMENT} of {first} and {second}"):
        a, b = (one.get("data", {}).get("fingerprint") for one in trees)
    if a != b:
        found.append(f"training text: {a!r} -> {b!r}")
    return found


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        found = compare(args.first, args.second)
    except UserError as error:
        print(f"jaxmoe.report: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(_plain({"same": found.same, **asdict(found)}), allow_nan=False))
    else:
        _show(found, Console(highlight=False, soft_wrap=True))
    return 0 if found.same else 1


def _plain(tree: Any) -> Any:
    """What is not finite as words: JSON has no numbers for it."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _show(found: RunDiff, out: Console) -> None:
    for title, rows in (("config", found.config), ("made with", found.versions)):
        for row in rows:
            out.print(f"{title}: {row}", markup=False)
    for one in found.numbers:
        if one.step is None:
            out.print(f"{one.name}: the same bits at {one.compared} steps")
            continue
        assert one.values is not None
        before = "" if one.same_until is None else f"the same up to step {one.same_until}, "
        a, b = one.values
        out.print(
            f"{one.name}: {before}differs at step {one.step} ({a!r}, {b!r}); by at most"
            f" {one.worst:.2g} over {one.compared} steps"
        )
    if not found.layers_compared:
        out.print("layers: no step in common that both recorded (health.statistics_every)")
    elif found.layers_step is None:
        out.print(f"layers: the same bits at {found.layers_compared} steps")
    else:
        since = found.layers_same_until
        before = "" if since is None else f"the same up to step {since}, "
        count = len(found.layers)
        out.print(f"layers: {before}differ at step {found.layers_step}, in {count} places:")
        for one in found.layers[:SHOWN]:
            out.print(f"  {one.name}, layer {one.layer}: size differs by {one.relative:.2g}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.report diff",
        description="Says from which step, and in which layer, two runs differ.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, metavar="RUN_A")
    parser.add_argument("second", type=Path, metavar="RUN_B")
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser
