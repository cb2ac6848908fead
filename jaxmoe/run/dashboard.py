"""The live view of a run on a terminal, and which view fits where."""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    OverflowMethod,
    RenderableType,
    RenderResult,
)
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxmoe.run.progress import Display, Plain, Quiet, Silent, View, clock

# Eighths of a block, and what stands for them where the terminal has no Unicode.
BLOCKS, DOTS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "_.-~=+*#"
WIDE = 120  # columns from which on there are two blocks of rows side by side
ECHO = 2  # columns left free: a ^C that is echoed there would fold the last line of a full width
CURVE = 24  # characters of a curve
FAR = 2.0  # standard deviations from which on a residual is shown as far

Row = tuple[str, Text]


def display(mode: str, title: str, *, writes: bool) -> Display:
    """The view that this process shows, by log.terminal and where its output goes."""
    if not writes:
        return Silent()
    if mode == "quiet":
        return Quiet()
    console = Console(force_terminal=True if mode == "live" else None)
    drawn = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(console, title) if mode != "plain" and drawn else Plain()


class LiveDisplay:
    """A panel that is redrawn in place; notes go above it."""

    def __init__(self, console: Console, title: str) -> None:
        self._dashboard = Dashboard(title)
        self._live = Live(self._dashboard, console=console, refresh_per_second=4)
        self._live.start()

    def note(self, text: str, *, alarm: bool = False) -> None:
        style = "bold red" if alarm else None
        self._live.console.print(text, markup=False, highlight=False, style=style)

    def show(self, view: View) -> None:
        self._dashboard.add(view)

    def close(self) -> None:
        self._live.stop()


class Dashboard:
    """What is drawn: the last view, and curves of those before it."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._view: View | None = None
        self._losses: deque[float] = deque(maxlen=32 * CURVE)
        self._held_out: dict[int, float] = {}  # by step

    def add(self, view: View) -> None:
        self._view = view
        if view.train_nll is not None:
            self._losses.append(view.train_nll)
        if view.bits_per_byte is not None and view.evaluated_at is not None:
            self._held_out[view.evaluated_at] = view.bits_per_byte

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view = self._view
        if view is None:
            return
        levels = DOTS if options.ascii_only else BLOCKS
        training = [*self._training(view, levels)]
        standing = [*self._standing(view, levels)]
        overflow: OverflowMethod = "crop" if options.ascii_only else "ellipsis"
        rows: RenderableType = _table([*training, *standing], overflow)
        if options.max_width >= WIDE:
            rows = Table.grid(expand=True, padding=(0, 2))
            rows.add_column(ratio=1)
            rows.add_column(ratio=1)
            rows.add_row(_table(training, overflow), _table(standing, overflow))
        past = "" if view.seconds is None else f" running for {clock(view.seconds)} "
        yield Panel(
            Group(_progress(view), rows),
            title=Text(f" {self._title} ", style="bold"),
            title_align="left",
            subtitle=Text(past, style="dim"),
            subtitle_align="right",
            border_style="dim",
            width=options.max_width - ECHO,
        )

    def _training(self, view: View, levels: str) -> Iterator[Row]:
        speed = _joined(
            _known("{:,.0f} tok/s", view.tokens_per_second),
            _known("MFU {:.0%}", view.mfu),
            _known("{:.3g} s a step", view.step_seconds),
        )
        yield "speed", speed or Text("not known yet", style="dim")
        if view.train_nll is not None:
            yield "loss", _joined(f"{view.train_nll:.3f}", _curve(self._losses, levels))
        if view.grad_norm is not None:
            rate = _known("learning rate {:.2e}", view.lr)
            yield "gradient", _joined(f"norm {view.grad_norm:.3g}", rate)
        if view.load is not None:
            span = f"{view.load[0]:.2f}..{view.load[1]:.2f} of an even share"
            dead = Text(f"{view.dead} dead", style="bold red") if view.dead else ""
            yield "experts", _joined(span, dead, _curve(view.loads, levels, "magenta", low=0.0))

    def _standing(self, view: View, levels: str) -> Iterator[Row]:
        """Against the forecasts, and what happened."""
        if view.bits_per_byte is not None:
            at = "" if view.evaluated_at is None else f" at step {view.evaluated_at:,}"
            value = f"{view.bits_per_byte:.3f} bits per byte{at}"
            yield "held-out", _joined(value, _curve(self._held_out.values(), levels))
        if view.expected is not None and view.residual is not None:
            far = "bold yellow" if abs(view.residual) > FAR else "green"
            sigma = Text(f"{view.residual:+.1f} sigma", style=far)
            yield "expected", _joined(f"{view.expected[0]:.3f} at that step, registered", sigma)
        if view.forecast is not None:
            median, low, high = view.forecast
            registered = view.registered and f"registered {view.registered[0]:.3f}"
            yield "forecast", _joined(f"{median:.3f} [{low:.3f}, {high:.3f}]", registered)
        if view.alarms and view.last_alarm is not None:
            count = Text(f"{view.alarms:,}", style="bold red")
            yield "alarms", _joined(count, f"last at {view.last_alarm}")
        else:
            yield "alarms", Text("none", style="green")
        again = f"{view.restarts:,}" if view.restarts else "none"
        since = "" if view.resumed_from is None else f"last from step {view.resumed_from:,}"
        yield "restarts", _joined(again, since)


def sparkline(values: Sequence[float], width: int, levels: str, low: float | None = None) -> str:
    """Means of `width` equal parts of the values (fewer where there are fewer), as blocks from the
    least (or `low`) to the largest; "" for less than two. What is not finite is left out."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    width = min(width, len(finite))
    edges = [round(i * len(finite) / width) for i in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    bottom = min(means) if low is None else low
    span = max(means) - bottom
    top = len(levels) - 1
    return "".join(levels[round((m - bottom) / span * top) if span else 0] for m in means)


def _progress(view: View) -> Table:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    left = "" if view.seconds_left is None else f"  {clock(view.seconds_left)} left"
    share = view.step / view.steps
    row.add_row(
        Text(f"step {view.step:,}/{view.steps:,}", style="bold"),
        ProgressBar(total=view.steps, completed=view.step),
        f"{math.floor(100 * share)}%{left}",
    )
    return row


def _table(rows: Sequence[Row], overflow: OverflowMethod) -> Table:
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, width=8)
    table.add_column(ratio=1, no_wrap=True, overflow=overflow)
    for row in rows:
        table.add_row(*row)
    return table


def _curve(values: Iterable[float], levels: str, style: str = "cyan", **low: float) -> Text:
    return Text(sparkline([*values], CURVE, levels, **low), style=style)


def _joined(*parts: str | Text | None) -> Text:
    """Those that are there, with a gap between."""
    return Text("   ").join(Text(p) if isinstance(p, str) else p for p in parts if p)


def _known(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)
