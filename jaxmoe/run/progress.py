"""What a person sees while a run goes on: plain lines here, the live view in dashboard.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

# Events that somebody should look at.
ALARMS = (
    *("alarm", "skip", "rollback", "bad-steps", "expert", "slow", "corruption", "damaged"),
    *("fallback", "save-failed"),
)


@dataclass(frozen=True, kw_only=True)
class View:
    """The state of a run in a person's units. None: not known yet."""

    step: int
    steps: int
    tokens_per_second: float | None = None
    train_nll: float | None = None  # nats per token
    bits_per_byte: float | None = None  # held out
    mfu: float | None = None
    load: tuple[float, float] | None = None  # least and most loaded expert; 1 is balanced
    dead: int = 0  # experts, over all layers
    seconds_left: float | None = None
    forecast: tuple[float, float, float] | None = None  # median and 90 % interval, bits per byte
    # Of the registered path, which is frozen: its end, and at the last eval; in bits per byte.
    registered: tuple[float] | None = None
    expected: tuple[float] | None = None
    residual: float | None = None  # of the last eval, standard deviations of that path
    evaluated_at: int | None = None  # step of the last eval
    seconds: float | None = None  # since the start, over all starts
    step_seconds: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    loads: tuple[float, ...] = ()  # of the experts of all layers, rising; () where there are many
    alarms: int = 0  # in all starts
    last_alarm: str | None = None
    restarts: int = 0
    resumed_from: int | None = None  # step of the last one

    def words(self) -> list[str]:
        """Each known quantity with its name."""
        words = []
        if self.tokens_per_second is not None:
            words.append(f"{self.tokens_per_second:,.0f} tok/s")
        if self.mfu is not None:
            words.append(f"MFU {self.mfu:.0%}")
        if self.train_nll is not None:
            words.append(f"loss {self.train_nll:.3f}")
        if self.bits_per_byte is not None:
            words.append(f"held-out {self.bits_per_byte:.3f} b/B{self._against_path()}")
        if self.forecast is not None:
            median, low, high = self.forecast
            words.append(f"final forecast {median:.3f} [{low:.3f}, {high:.3f}]")
        if self.registered is not None:
            words.append(f"registered {self.registered[0]:.3f}")
        if self.load is not None:
            dead = f", {self.dead} dead" if self.dead else ""
            words.append(f"expert load {self.load[0]:.2f}..{self.load[1]:.2f}{dead}")
        return words

    def _against_path(self) -> str:
        if self.expected is None or self.residual is None:
            return ""
        return f" (registered {self.expected[0]:.3f}, {self.residual:+.1f} sigma)"


def in_bits(standing: Mapping[str, Any], nll: float | None, bits_per_nat: float) -> dict[str, Any]:
    """What a view shows of the held-out loss and its forecasts, in bits per byte.

    Args:
        standing: where the run stands, as in its metrics; nll: held-out, nats per token.
    """

    def bits(*names: str) -> tuple[float, ...] | None:
        found = [standing[key] for n in names if (key := f"forecast/{n}") in standing]
        return tuple(bits_per_nat * value for value in found) or None

    return {
        "bits_per_byte": nll and nll * bits_per_nat,
        "forecast": bits("final", "final_q05", "final_q95"),
        "registered": bits("registered_final"),
        "expected": bits("expected"),
        "residual": standing.get("forecast/residual"),
    }


def of_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a view shows of a line of metrics.jsonl, beside the words of a plain one."""
    loads = [load for layer in line.get("moe/load", ()) for load in layer]
    return {
        "seconds": line["seconds"],
        "step_seconds": line["perf/step_seconds"],
        "grad_norm": line["train/grad_norm"],
        "lr": line["train/lr"],
        "loads": tuple(sorted(loads)),
    }


class Tally:
    """What a view shows of a run's events, those of its earlier starts included. What a start tells
    again, since it took steps again, counts once."""

    def __init__(self) -> None:
        self._alarms: dict[tuple[str, int, str], None] = {}
        self._starts = 0
        self._resumed_from: int | None = None

    def add(self, what: str, step: int, why: str) -> None:
        if what in ALARMS:
            self._alarms.pop((what, step, why), None)
            self._alarms[what, step, why] = None
        elif what in ("start", "resume"):
            self._starts += 1
            self._resumed_from = step if what == "resume" else self._resumed_from

    def known(self) -> dict[str, Any]:
        """Fields of a View."""
        last = next(reversed(self._alarms), None)
        return {
            "alarms": len(self._alarms),
            "last_alarm": f"step {last[1]}, {last[0]}: {' '.join(last[2].split())}"
            if last
            else None,
            "restarts": max(0, self._starts - 1),
            "resumed_from": self._resumed_from,
        }


class Display(Protocol):
    def note(self, text: str, *, alarm: bool = False) -> None:
        """A line that stays. `alarm`: somebody should look at it."""
        ...

    def show(self, view: View) -> None: ...

    def close(self) -> None: ...


class Silent:
    """For all processes but the first."""

    def note(self, text: str, *, alarm: bool = False) -> None:
        pass

    def show(self, view: View) -> None:
        pass

    def close(self) -> None:
        pass


class Quiet(Silent):
    """Only what somebody should look at."""

    def note(self, text: str, *, alarm: bool = False) -> None:
        if alarm:
            print(text, flush=True)


class Plain:
    """A line at a time, for logs and pipes."""

    def note(self, text: str, *, alarm: bool = False) -> None:
        print(text, flush=True)

    def show(self, view: View) -> None:
        left = "" if view.seconds_left is None else f"  {clock(view.seconds_left)} left"
        print(f"step {view.step}/{view.steps}{left}  {'  '.join(view.words())}", flush=True)

    def close(self) -> None:
        pass


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
