"""Where the time of a run goes: every second belongs to one bucket, over all of its starts.

goodput.jsonl gets a line at each start, checkpoint and rollback, at the end, and now and then while
steps go on. A line accounts for all of the time since the line before it of the same start, in
whole microseconds, so that the sum over a run is the time from its first line to its last, exactly.
What lies between the last line of a start and the next start is `down`: after a kill it holds the
seconds that had no line yet.

    {"time": "2026-11-23T07:00:12.345678+00:00", "start": 2, "step": 120, "seconds": {"steps": 4.2}}

`time` ends the line's seconds. `back`, where a line has it, is the step whose state the run went on
from: after a restart, or a rollback at `step`. The steps beyond it were for nothing (`undone`).
"""

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

__all__ = ["BUCKETS", "GOODPUT", "Account", "Ledger", "account", "age", "wall_clock"]

GOODPUT = "goodput.jsonl"
# Between lines while steps go on: a share of the start's age, within these seconds. It is what a
# kill turns into `down`; a week of lines takes 3 MB.
SHARE, LEAST, MOST = 0.002, 1.0, 30.0
BUCKETS = {
    "steps": "productive steps",
    "undone": "steps undone",
    "data": "data wait",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "compile": "compiling",
    "restore": "restoring",
    "startup": "start-up",
    "other": "other",
    "down": "down or lost",
}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICRO = timedelta(microseconds=1)


class Record(Protocol):
    """What a ledger writes to (run/record.py)."""

    def append(self, name: str, line: Mapping[str, Any]) -> None: ...

    def mended(self, name: str) -> list[dict[str, Any]]: ...


def wall_clock() -> Callable[[], int]:
    """Microseconds since 1970; never back, also where somebody sets the clock meanwhile."""
    ahead = (time.time_ns() - time.perf_counter_ns()) // 1000
    return lambda: ahead + time.perf_counter_ns() // 1000


def age() -> float:
    """Seconds since this process was created, to 10 ms; 0 where the system does not say (Linux
    does)."""
    try:
        stat = Path("/proc/self/stat").read_text()
        begun = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - begun)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Ledger:
    """Of one start: one bucket at a time has the time that passes."""

    def __init__(self, born: float = 0.0, clock: Callable[[], int] | None = None) -> None:
        """`born`: seconds ago that the start began; `clock`: see `wall_clock`."""
        self._clock = clock or wall_clock()
        self._at = self._line_at = self._born = self._clock() - round(born * 1e6)
        self._bucket = "startup"
        self._spent: Counter[str] = Counter()
        self._record: Record | None = None
        self._start = 0
        self._step = 0
        self._handed: deque[tuple[int, Hashable]] = deque()  # steps whose end was not seen
        self._ended = self._at
        self._shortest: dict[Hashable, int] = {}  # step on the device, by shape

    def open(self, record: Record) -> None:
        """Lines go to this record from here on; the first one says when this start began."""
        self._start = 1 + max((one["start"] for one in record.mended(GOODPUT)), default=0)
        self._record = record
        record.append(GOODPUT, {"time": _text(self._line_at), "start": self._start})

    def turn(self, bucket: str) -> str:
        """Time from now on belongs to `bucket`; the one that it belonged to."""
        now = self._clock()
        self._spent[self._bucket] += now - self._at
        self._at = now
        before, self._bucket = self._bucket, bucket
        return before

    @contextmanager
    def during(self, bucket: str) -> Iterator[None]:
        before = self.turn(bucket)
        try:
            yield
        finally:
            self.turn(before)

    @contextmanager
    def drawing(self, idle: Callable[[], bool]) -> Iterator[None]:
        """The next batch is drawn in here. What the device waits for it is `data`.

        Args:
            idle: whether the device has nothing to do by now. Since when is not known: a step is
                taken to last as long as the shortest so far.
        """
        begun = self._clock()
        yield
        if idle():
            self.turn(self._bucket)
            waited = min(max(0, self._at - max(begun, self._done())), self._spent[self._bucket])
            self._spent[self._bucket] -= waited
            self._spent["data"] += waited

    def _done(self) -> int:
        """When the step that the device was given last should have ended."""
        if not self._handed:
            return 0
        when, shape = self._handed[-1]
        return max(when, self._ended) + self._shortest.get(shape, 0)

    def handed(self, shape: Hashable = None) -> None:
        """A step was given to the device."""
        self._handed.append((self._clock(), shape))

    def ended(self, step: int) -> None:
        """The end of the oldest of these was seen. Now and then it is time for a line."""
        now = self._clock()
        when, shape = self._handed.popleft()
        took = now - max(when, self._ended)
        self._shortest[shape] = min(took, self._shortest.get(shape, took))
        self._ended = now
        every = min(MOST, max(LEAST, SHARE * (now - self._born) / 1e6))
        if now - self._line_at >= every * 1e6:
            self.line(step)

    def line(self, step: int | None = None, *, back: int | None = None) -> None:
        """Writes what was spent since the line before, up to the end of a step (None: that of the
        line before). `back`: the run goes on from the state after that step."""
        self.turn(self._bucket)
        self._step = step = self._step if step is None else step
        if back is not None:
            self._handed.clear()
        if self._record is None:
            return
        spent = {name: micros / 1e6 for name, micros in self._spent.items() if micros}
        where = {} if back is None else {"back": back}
        head = {"time": _text(self._at), "start": self._start, "step": step}
        self._record.append(GOODPUT, {**head, **where, "seconds": spent})
        self._line_at = self._at
        self._spent.clear()


@dataclass(frozen=True, kw_only=True)
class Account:
    """Of a run, all its starts together.

    Attributes:
        begin, end: microseconds since 1970.
        spent: microseconds of each of BUCKETS that has any; their sum is end - begin.
        starts: how often it was started; undone: steps that were done for nothing.
    """

    begin: int
    end: int
    spent: dict[str, int]
    starts: int
    undone: int

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e6

    @property
    def goodput(self) -> float:
        """Share of the time in steps that are part of the model."""
        return self.spent.get("steps", 0) / (self.end - self.begin) if self.end > self.begin else 0

    def shares(self) -> list[tuple[str, str, float, float]]:
        """(bucket, in words, seconds, share) of those that have any."""
        whole = self.end - self.begin or 1
        known = [(name, self.spent.get(name, 0)) for name in BUCKETS]
        return [(name, BUCKETS[name], v / 1e6, v / whole) for name, v in known if v]

    def summary(self) -> dict[str, Any]:
        """For scripts; seconds."""
        buckets = {name: seconds for name, _, seconds, _ in self.shares()}
        known = {"seconds": self.seconds, "goodput": self.goodput, "buckets": buckets}
        return {**known, "starts": self.starts, "steps_undone": self.undone}

    def sentence(self) -> str:
        """'goodput 81.2 % of 192 s in 2 starts: evaluation 9.0 %, ...'."""
        rest = sorted(self.shares(), key=lambda one: -one[2])
        said = ", ".join(f"{name} {share:.1%}" for key, name, _, share in rest if key != "steps")
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        return f"goodput {self.goodput:.1%} of {self.seconds:.0f} s{starts}: {said}"


def account(lines: Iterable[Mapping[str, Any]]) -> Account | None:
    """Adds up a goodput.jsonl; None where there is no line.

    Time between two lines that neither has is `down` before a start and else `other`. Time that two
    lines both have (a start that began before the one before had ended, a clock that was set back)
    counts once.

    Raises:
        KeyError, TypeError, ValueError: a line is not one of a ledger.
    """
    spent: Counter[str] = Counter()
    spans: list[tuple[int, int, int]] = []  # first state, last state, microseconds of steps
    begin = at = None
    start, step, undone = 0, 0, 0.0
    for row in lines:
        own = {name: round(value * 1e6) for name, value in row.get("seconds", {}).items()}
        end = _micros(row["time"])
        if begin is None or at is None:
            begin = at = end - sum(own.values())
        _fit(own, max(0, end - at), "other" if row["start"] == start else "down")
        at, start = max(at, end), row["start"]
        last, back = row.get("step", step), row.get("back")
        spans.append((min(step, last), last, own.get("steps", 0)))
        step = last
        spent.update(own)
        if back is not None:
            spans, micros, steps = _put_back(spans, back)
            spent.update(steps=-micros, undone=micros)
            undone += steps
    if begin is None or at is None:
        return None
    known = {name: micros for name, micros in spent.items() if micros}
    return Account(begin=begin, end=at, spent=known, starts=start, undone=round(undone))


def _fit(spent: dict[str, int], span: int, rest: str) -> None:
    """Makes the sum of `spent` be `span`: `rest` gets what is missing; what is too much goes."""
    missing = span - sum(spent.values())
    if missing > 0:
        spent[rest] = spent.get(rest, 0) + missing
    for name in spent:
        cut = min(spent[name], max(0, -missing))
        spent[name] -= cut
        missing += cut


def _put_back(
    spans: list[tuple[int, int, int]], back: int
) -> tuple[list[tuple[int, int, int]], int, float]:
    """Spans that are left of the state after step `back`; microseconds and steps that are not."""
    kept, micros, steps = [], 0, 0.0
    for first, last, own in spans:
        if last <= back:
            kept.append((first, last, own))
            continue
        # Lines are written where a state is saved, so that a span is cut in two only where a line
        # is missing; its steps are then taken to be alike.
        share = max(0, back - first) / (last - first) if last > first else 0.0
        own_kept = round(own * share)
        if share:
            kept.append((first, back, own_kept))
        micros += own - own_kept
        steps += (last - first) * (1 - share)
    return kept, micros, steps


def _text(micros: int) -> str:
    return (EPOCH + micros * MICRO).isoformat(timespec="microseconds")


def _micros(text: str) -> int:
    return (datetime.fromisoformat(text) - EPOCH) // MICRO
