"""A family is a function of the rung: `rung(k) -> Config`, in a Python file of the user's."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe import config as config_lib
from jaxmoe.config import Config, replace
from jaxmoe.config_check import check
from jaxmoe.config_file import import_file
from jaxmoe.curriculum import curriculum
from jaxmoe.errors import UserError
from jaxmoe.optim import rates
from jaxmoe.run import record

__all__ = ["DIAL", "Family", "load_family", "numbers", "recipe", "recipe_fingerprint"]

DEFAULT_FUNCTION = "rung"
# What a rung may change: sizes, tokens, what follows from them by transfer rules, and what does not
# change losses. All other leaves of the config are the recipe, equal on all rungs.
DIAL = (
    *("name", "seed", "mesh.*", "checkpoint.*", "forecast.*", "health.*", "log.*"),
    *("data.cache", "data.damaged"),
    *("model.d_model", "model.n_layers", "model.n_heads", "model.n_kv_heads", "model.d_head"),
    *("model.mla.*", "model.d_ff", "model.d_ff_dense", "model.n_experts", "model.top_k"),
    *record.COMPUTED,
    *("optim.lr", "optim.weight_decay", "optim.warmup_steps"),
    *("optim.eps", "train.steps", "train.batch_size"),
    *("train.batch_ramp", "train.accumulate", "train.log_every", "eval.every", "eval.batch_size"),
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Configs by rung.

    Attributes:
        name: FILE:FUNCTION as given, and the changes on top of it.
        sets: `a.b=v`, applied to every rung.
        varies: leaves beyond DIAL that the rung changes (VARIES of the file).
    """

    name: str
    build: Callable[[int], Any]
    sets: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()

    def config(self, rung: int, seed: int = 0) -> Config:
        """The config of one rung; its seed is that of the family plus `seed`.

        Raises:
            UserError: the function fails, returns no Config, or one that breaks a rule.
        """
        where = f"--family {self.name}: rung {rung}"
        try:
            config = self.build(rung)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:
            raise UserError(f"{where}: {type(error).__name__}: {error}") from error
        if not isinstance(config, Config):
            raise UserError(f"{where}: it gave {type(config).__name__}, not Config")
        try:
            config = config_lib.apply_sets(config, self.sets)
            config = replace(config, seed=config.seed + seed)
            check(config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return config

    def changed(self, sets: Sequence[str]) -> "Family":
        """The same with further changes on every rung: a layer over a known-good recipe."""
        name = " ".join([self.name, *sets])
        return replace(self, name=name, sets=(*self.sets, *sets))


def load_family(spec: str, sets: Sequence[str] = ()) -> Family:
    """`FILE[:FUNCTION]`; without a function the one named `rung` is called.

    Raises:
        UserError: no such file or function.
    """
    file, _, function = spec.partition(":")
    path, function = Path(file), function or DEFAULT_FUNCTION
    if not path.is_file():
        raise UserError(f"--family {file}: no such file; it holds a function rung(k) -> Config")
    module = import_file(path, "--family")
    build = getattr(module, function, None)
    if not callable(build):
        raise UserError(f"--family {file}: it has no function {function!r} of the rung")
    varies = tuple(getattr(module, "VARIES", ()))
    family = Family(name=f"{path.name}:{function}", build=build, varies=varies)
    return family.changed(sets) if sets else family


def recipe(config: Config, varies: Sequence[str] = ()) -> dict[str, Any]:
    """Leaves by dotted key, JSON values, without those of DIAL and `varies`."""
    loose = (*DIAL, *varies)
    leaves = config_lib.leaves(config_lib.counted(config))
    return {k: v for k, v in leaves if not any(fnmatchcase(k, one) for one in loose)}


def recipe_fingerprint(leaves: dict[str, Any]) -> str:
    """12 hex digits of the SHA-256 of the canonical JSON."""
    text = json.dumps(leaves, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def numbers(text: str, option: str, *, count: bool = False) -> list[int]:
    """`0..3`, `0,2,5`, `4`; with `count`, a single number N means 0 .. N - 1.

    Raises:
        UserError: it is none of these, or names nothing.
    """
    try:
        if count and text.isdigit():
            found = list(range(int(text)))
        else:
            found = [n for part in text.split(",") for n in _range(part)]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise UserError(f"{option} {text}: write it as 0..3 or 0,2,5")
    return sorted(set(found))


def annealed_at(config: Config, shares: Sequence[float]) -> list[int]:
    """Steps of shorter runs whose schedule is this one's until they decay; the whole run last.

    Raises:
        UserError: the schedule is not WSD, or a shorter run would decay within the warm-up.
    """
    steps = config.train.steps
    wanted = sorted({round(share * steps) for share in shares} - {steps})
    if wanted and config.optim.schedule != "wsd":
        raise UserError(
            f"--horizons: optim.schedule={config.optim.schedule} does not branch; use wsd"
        )
    path = rates(config) if wanted else np.zeros(0)
    for horizon in wanted:
        start = decay_start(config, horizon)
        if not config.optim.warmup_steps < start < horizon < steps:
            raise UserError(
                f"--horizons: {horizon} of {steps} steps would decay from step {start}, not after"
                f" the warm-up of {config.optim.warmup_steps}; give shares of 1 that are larger"
            )
        if not np.array_equal(path[:start], rates(shortened(config, horizon))[:start]):
            raise UserError(
                f"--horizons: a run of {horizon} steps would have other rates than one of {steps}"
                " before it decays (optim.batch_rule follows the largest batch, which it does not"
                " reach); give larger shares"
            )
    return [*wanted, steps]


def decay_start(config: Config, steps: int) -> int:
    """The last step of a WSD run of so many steps before its rate decays (optim.schedule)."""
    return steps - max(1, round(steps * config.optim.decay_fraction))


def shortened(config: Config, steps: int) -> Config:
    """The same run over fewer steps."""
    return replace(config, train=replace(config.train, steps=steps))


def tokens(config: Config) -> int:
    """Of the whole run."""
    return curriculum(config).tokens(config.train.steps)


def _range(part: str) -> range:
    low, dots, high = part.partition("..")
    return range(int(low), int(high) + 1) if dots else range(int(low), int(low) + 1)


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(leaf, in a, in b) of recipes."""
    return [(k, a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def differences(a: Config, b: Config) -> list[str]:
    """Leaves that decide losses and differ, `key: a -> b`."""
    return config_lib.diff(record.recipe(a), record.recipe(b))
