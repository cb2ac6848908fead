"""What the loop watches for while it trains: the alarms of jaxmoe.forecast.alarms on its numbers.

All processes watch the same numbers, so they decide alike; curves of siblings, which come with the
forecast that was registered before the start, are told to all. The registered path is known to the
first alone, which writes the register, and its alarms are told but never acted on.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmoe.config import Config
from jaxmoe.curriculum import curriculum
from jaxmoe.forecast.alarms import (
    Alarm,
    Band,
    ShiftWatch,
    SpikeWatch,
    beside,
    prior_of,
)
from jaxmoe.forecast.hook_api import PathPoint

BAND_KINDS = ("left the band", "too good")  # alarms of the first process alone
SIBLINGS = 3  # curves from which on the noise of one can be told from the others


class Watching:
    """Attributes:
    expected: of the registered path at the last held-out loss, nats per token; None before it
        begins.
    residual: of that loss, in standard deviations of the path.
    """

    def __init__(self, config: Config, curves: Sequence[Sequence[Sequence[float]]] = ()) -> None:
        """`curves`: of completed siblings, [share of the run's tokens, held-out loss] each."""
        evals = config.train.steps // config.eval.every
        self._config = config
        known: dict[str, Any] = {}
        if len(curves) >= SIBLINGS:
            siblings = [(c[:, 0], c[:, 1]) for c in map(np.array, curves)]
            base = beside(siblings)
            known = {"prior": prior_of(siblings), "baseline": _by_step(config, base)}
        self._shift = ShiftWatch(evals, alpha=config.forecast.false_alarms, **known)
        # A batch's loss varies by a few per cent; the norm has a heavy tail: with 0.1 small batches
        # raised 29 alarms in 15,000 steps, at up to 6 times the usual (LOG.md, 2026-11-23).
        loss, norm = SpikeWatch("train loss", floor=0.02), SpikeWatch("gradient norm", floor=0.25)
        self._spikes = (loss, norm)
        self._band: Band | None = None
        self._acts: Alarm | None = None
        self.expected: float | None = None
        self.residual: float | None = None

    def state(self) -> list[list[float]]:
        """Windows of the spikes; the rest follows from the held-out losses."""
        return [list(spike.values) for spike in self._spikes]

    def restore(self, state: list[list[float]], seen: Iterable[Sequence[float]]) -> None:
        """`seen`: steps and held-out losses so far. What they raised was told when it was seen."""
        for spike, values in zip(self._spikes, state, strict=False):
            spike.values.extend(values)
        for step, loss in seen:
            self.after_eval(int(step), loss)
        self._acts = None

    def freeze(self, path: Sequence[Mapping[str, Any]] | None) -> None:
        """The path of the first registered forecast, if there is one yet."""
        if self._band is None and path:
            self._band = Band([PathPoint(**point) for point in path])

    def after_step(self, step: int, loss: float, grad_norm: float) -> list[Alarm]:
        values = zip(self._spikes, (loss, grad_norm), strict=True)
        found = [alarm for spike, value in values if (alarm := spike.add(step, value))]
        return self._acted_on(found)

    def after_eval(self, step: int, loss: float) -> list[Alarm]:
        """A loss from within the warm-up has no path yet."""
        found: list[Alarm] = []
        if step > self._config.optim.warmup_steps:
            found = self._acted_on(self._shift.add(step, loss)[1])
        at = self._band.at(step) if self._band is not None else None
        if self._band is not None and at is not None:
            self.expected = at[1]
            self.residual, alarm = self._band.add(step, loss)
            found = [*found, alarm] if alarm else found
        return found

    @property
    def alarmed(self) -> bool:
        """Whether `acts` has something to tell."""
        return self._acts is not None

    def acts(self) -> Alarm | None:
        """An alarm that something is to follow (forecast.on_alarm); told once."""
        alarm, self._acts = self._acts, None
        return alarm

    def _acted_on(self, found: list[Alarm]) -> list[Alarm]:
        if found and self._config.forecast.on_alarm != "log":
            self._acts = found[0]
        return found


def curves_of(planned: Mapping[str, Any] | None) -> list[list[list[float]]]:
    """Of the siblings of a registered forecast, as process 0 reads them; told to all processes."""
    siblings = (planned or {}).get("siblings") or []
    return told_to_all([one["curve"] for one in siblings if one.get("curve")])


def _by_step(config: Config, base: Callable[[float], float]) -> Callable[[float], float]:
    plan = curriculum(config)
    total = plan.tokens(config.train.steps)
    return lambda step: base(plan.tokens(int(step)) / total)


def told_to_all(value: Any) -> Any:
    """JSON values of process 0, in all of them."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    data = np.zeros(size, np.uint8)
    data[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))
