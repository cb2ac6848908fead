"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


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


class Display(Protocol):
    def note(self, text: str) -> None: ...

    def show(self, view: View) -> None: ...

    def close(self) -> None: ...


class Silent:
    """For all processes but the first."""

    def note(self, text: str) -> None:
        pass

    def show(self, view: View) -> None:
        pass

    def close(self) -> None:
        pass


class Plain:
    """A line at a time, for logs and pipes."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show(self, view: View) -> None:
        left = "" if view.seconds_left is None else f"  {clock(view.seconds_left)} left"
        print(f"step {view.step}/{view.steps}{left}  {'  '.join(view.words())}", flush=True)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A bar and a line under it, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._bar.add_task("train", total=None)
        self._live = Live(self._bar, console=console, refresh_per_second=4)
        self._live.start()

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def show(self, view: View) -> None:
        self._bar.update(self._task, completed=view.step, total=view.steps)
        self._live.update(Group(self._bar, Text("  ".join(view.words()), style="cyan")))

    def close(self) -> None:
        self._live.stop()


def display(*, writes: bool) -> Display:
    """The view that fits this process and where its output goes."""
    if not writes:
        return Silent()
    console = Console()
    return LiveDisplay(console) if console.is_terminal else Plain()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
