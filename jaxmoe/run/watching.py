"""What the loop watches for while it trains: the alarms of jaxmoe.forecast.alarms on its numbers.

All processes watch the same numbers, so they decide alike; the registered path is known to the
first alone, which writes the register, and its alarms are told but never acted on.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxmoe.config import Config
from jaxmoe.forecast.alarms import Alarm, Band, ShiftWatch, SpikeWatch
from jaxmoe.forecast.hook_api import PathPoint


class Watching:
    """Attributes:
    residual: of the last held-out loss, in standard deviations of the registered path; None
        before there is one.
    """

    def __init__(self, config: Config) -> None:
        evals = config.train.steps // config.eval.every
        self._config = config
        self._shift = ShiftWatch(evals, alpha=config.forecast.false_alarms)
        # A batch's loss varies by a few per cent, its gradient's norm by tens.
        loss, norm = SpikeWatch("train loss", floor=0.02), SpikeWatch("gradient norm", floor=0.1)
        self._spikes = (loss, norm)
        self._band: Band | None = None
        self._acts: Alarm | None = None
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
        if self._band is not None:
            self.residual, alarm = self._band.add(step, loss)
            found = [*found, alarm] if alarm else found
        return found

    def acts(self) -> Alarm | None:
        """An alarm that something is to follow (forecast.on_alarm); told once."""
        alarm, self._acts = self._acts, None
        return alarm

    def _acted_on(self, found: list[Alarm]) -> list[Alarm]:
        if found and self._config.forecast.on_alarm != "log":
            self._acts = found[0]
        return found
