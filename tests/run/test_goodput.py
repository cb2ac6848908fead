"""Every second of a run belongs to one bucket; sums are exact over kills, restarts, rollbacks."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Killed, events, lines
from rehearsal import rehearse

from jaxmoe.config import FaultConfig, GuardConfig
from jaxmoe.run import goodput
from jaxmoe.run.goodput import BUCKETS, GOODPUT, Ledger, account, age, wall_clock
from jaxmoe.run.record import RunRecord

START = 1_790_000_000_000_000
KINDS = ("step", "between", "save", "rollback", "kill", "evaluation", "compile", "other")
Op = tuple[str, int]


class Clock:
    """Microseconds that pass only when they are told to."""

    now = START

    def __call__(self) -> int:
        return self.now


class Kept:
    """A record in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def append(self, name: str, line: Any) -> None:
        assert name == GOODPUT
        self.lines.append(dict(line))

    def mended(self, name: str) -> list[dict[str, Any]]:
        return self.lines


class Told:
    """A run by a real ledger, and beside it what its lines should add up to."""

    def __init__(self) -> None:
        self.clock, self.record = Clock(), Kept()
        self.spent: Counter[str] = Counter()  # as far as there are lines
        self.waiting: Counter[str] = Counter()  # not in a line yet
        # Of each step that counts its microseconds, and what was spent between steps, by the step
        # of the line that has it; and the same that is in no line yet.
        self.steps: list[tuple[int, int]] = []
        self.between: list[tuple[int, int]] = []
        self.late: list[tuple[int, int]] = []
        self.late_between = 0
        self.step = self.saved = self.undone = 0
        self.seen = 0
        self.begin(0)

    def begin(self, gap: int) -> None:
        self.spent["down"] += self.waiting.total() + gap
        self.waiting.clear()
        self.late.clear()
        self.late_between = 0
        self.clock.now += gap
        self.ledger = Ledger(clock=self.clock)
        self.ledger.open(self.record)
        self.pass_("startup", 1234)
        self.put_back(self.saved)
        self.step = self.saved
        self.ledger.line(self.saved, back=self.saved)
        self.settle()
        self.ledger.turn("steps")

    def pass_(self, bucket: str, micros: int) -> None:
        self.clock.now += micros
        self.waiting[bucket] += micros

    def put_back(self, step: int) -> None:
        self.undone += sum(s > step for s, _ in self.steps)
        lost = sum(micros for s, micros in self.steps + self.between if s > step)
        self.steps = [one for one in self.steps if one[0] <= step]
        self.between = [one for one in self.between if one[0] <= step]
        self.spent["undone"] += lost
        self.spent["steps"] -= lost

    def settle(self) -> None:
        if len(self.record.lines) > self.seen:
            self.spent += self.waiting
            self.steps += self.late
            self.between.append((self.step, self.late_between))
            self.late_between = 0
            self.waiting.clear()
            self.late.clear()
            self.seen = len(self.record.lines)

    def do(self, kind: str, micros: int) -> None:
        if kind == "step":
            self.step += 1
            self.ledger.handed()
            self.pass_("steps", micros)
            self.late.append((self.step, micros))
            self.ledger.ended(self.step)
        elif kind == "between":
            self.pass_("steps", micros)
            self.late_between += micros
        elif kind == "save":
            self.ledger.line(self.step)
            self.settle()
            with self.ledger.during("checkpoint"):
                self.pass_("checkpoint", micros)
            self.ledger.line(self.step)
            self.saved = self.step
        elif kind == "rollback":
            with self.ledger.during("restore"):
                self.pass_("restore", micros)
                self.ledger.line(self.step, back=self.saved)
            self.settle()
            self.put_back(self.saved)
        elif kind == "kill":
            self.begin(micros)
        else:
            with self.ledger.during(kind):
                self.pass_(kind, micros)
        self.settle()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9_000_000)), max_size=60))
def test_buckets_are_what_was_done_and_sum_up_exactly(ops: list[Op]) -> None:
    told = Told()
    for kind, micros in ops:
        told.do(kind, micros)
    told.ledger.line(told.step)
    told.settle()
    found = account(told.record.lines)
    assert found is not None
    assert (found.begin, found.end) == (START, told.clock.now)
    assert sum(found.spent.values()) == found.end - found.begin
    assert found.spent == {name: micros for name, micros in told.spent.items() if micros}
    assert found.undone == told.undone
    assert found.starts == 1 + sum(kind == "kill" for kind, _ in ops)


@st.composite
def ledger_lines(draw: st.DrawFn) -> dict[str, Any]:
    """A line in the format, with any values: clocks that were set back, starts that overlap."""
    micros = st.integers(0, 10**10)
    time = datetime.fromtimestamp(1_790_000_000, UTC) + timedelta(microseconds=draw(micros))
    spent = draw(st.dictionaries(st.sampled_from([*BUCKETS]), micros, max_size=4))
    line: dict[str, Any] = {"time": time.isoformat(timespec="microseconds")}
    line |= {"start": draw(st.integers(1, 3)), "step": draw(st.integers(0, 20))}
    line["seconds"] = {name: value / 1e6 for name, value in spent.items()}
    if draw(st.booleans()):
        line["back"] = draw(st.integers(0, 20))
    return line


@settings(max_examples=300, deadline=None)
@given(st.lists(ledger_lines(), min_size=1, max_size=12))
def test_no_lines_make_the_sum_wrong(rows: list[dict[str, Any]]) -> None:
    found = account(rows)
    assert found is not None
    times = [datetime.fromisoformat(row["time"]) for row in rows]
    first = sum(round(value * 1e6) for value in rows[0]["seconds"].values())
    micros = timedelta(microseconds=1)
    assert found.end - found.begin == (max(times) - times[0]) // micros + first
    assert sum(found.spent.values()) == found.end - found.begin
    assert all(value > 0 for value in found.spent.values()) and found.spent.keys() <= BUCKETS.keys()


def test_time_of_no_line_is_down_between_starts_and_else_other() -> None:
    rows = [
        {"time": "2026-11-23T07:00:00+00:00", "start": 1},
        {"time": "2026-11-23T07:00:10+00:00", "start": 1, "step": 5, "seconds": {"steps": 9.0}},
        {"time": "2026-11-23T07:00:30+00:00", "start": 2},
        # A start that began while the one before was at work: its seconds count once.
        {"time": "2026-11-23T07:00:33+00:00", "start": 3, "step": 5, "seconds": {"startup": 8.0}},
    ]
    found = account(rows)
    assert found is not None
    assert found.spent == {k: v * 10**6 for k, v in SPENT.items()} and found.starts == 3


SPENT = {"steps": 9, "other": 1, "down": 20, "startup": 3}


def test_waiting_for_data_is_what_lies_beyond_the_step() -> None:
    """A draw of 50 counts in full where no step is under way, and not at all where the device is
    still busy after it; else from when the step, as long as the shortest, should have ended."""

    def waited(*handed: int, idle: bool, took: tuple[int, ...] = (90, 30, 60)) -> int:
        """Microseconds of a draw of 50 that begins at 0; steps are handed over before, the first
        of several has ended at -10."""
        clock, record = Clock(), Kept()
        ledger = Ledger(clock=clock)
        ledger.open(record)
        for each in took:
            clock.now += 1000
            ledger.handed()
            clock.now += each
            ledger.ended(1)
        clock.now = begun = START + 10_000
        ledger.turn("steps")
        for before in handed:
            clock.now = begun - before
            ledger.handed()
        if len(handed) > 1:
            clock.now = begun - 10
            ledger.ended(2)
        clock.now = begun
        with ledger.drawing(lambda: idle):
            clock.now += 50
        ledger.line(2)
        return round(1e6 * record.lines[-1]["seconds"].get("data", 0))

    assert waited(idle=True) == 50
    assert waited(10, idle=True) == 30
    assert waited(40, idle=True) == 50
    assert waited(45, 40, idle=True) == 30  # the second began where the first ended
    assert waited(10, idle=True, took=(90,)) == 0
    assert waited(10, idle=False) == 0


def test_lines_grow_rarer_and_a_kill_loses_little() -> None:
    """Of steps of 10 ms: one a second at first, then every 500th of the time, 30 s at most."""
    clock, record = Clock(), Kept()
    ledger = Ledger(clock=clock)
    ledger.open(record)
    ledger.line(0, back=0)
    gaps = {}
    for hours in (0.0, 2.0, 40.0):
        clock.now = START + round(hours * 3.6e9)
        ledger.line(0)
        before = len(record.lines)
        for step in range(8000):
            ledger.handed()
            clock.now += 10_000
            ledger.ended(step)
        gaps[hours] = 80 / (len(record.lines) - before)
    assert gaps[0.0] == 1
    assert gaps[2.0] == pytest.approx(14.4, rel=0.15) and gaps[40.0] == pytest.approx(30, rel=0.35)


def test_a_torn_line_is_cut_off_before_the_next_start(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, writes=True)
    first = Ledger()
    first.open(record)
    first.line(3)
    with open(tmp_path / GOODPUT, "a") as file:
        file.write('{"time": "2026-')
    Ledger().open(record)
    assert [row["start"] for row in lines(tmp_path / GOODPUT)] == [1, 1, 2]
    Ledger().open(RunRecord(tmp_path, writes=False))
    assert len(lines(tmp_path / GOODPUT)) == 3


def test_a_start_begins_with_its_process() -> None:
    clock, record = wall_clock(), Kept()
    before = clock()
    assert 0 < age() < 86400
    Ledger(1.0).open(record)
    born = datetime.fromisoformat(record.lines[0]["time"]).timestamp()
    assert 0 <= born - (before / 1e6 - 1) < 1


def test_a_real_run_that_was_killed_is_accounted_for(killed: Killed) -> None:
    """Three kills and a start to the end: the sum is the time from the first line to the last, the
    lines of each start know all of their own time, and gaps alone are `down`."""
    rows = lines(killed.run_dir / GOODPUT)
    found = account(rows)
    assert found is not None
    times = [datetime.fromisoformat(row["time"]) for row in rows]
    assert times == sorted(times)
    micros = timedelta(microseconds=1)
    assert sum(found.spent.values()) == (times[-1] - times[0]) // micros
    begun = len(events(killed.run_dir, "start")) + len(events(killed.run_dir, "resume"))
    assert found.starts == begun >= 4
    gaps = 0
    for before, after, row in zip(times, times[1:], rows[1:], strict=False):
        if "step" not in row:
            gaps += (after - before) // micros
    assert found.spent["down"] == gaps > 0
    assert {
        "steps",
        "evaluation",
        "checkpoint",
        "compile",
        "restore",
        "startup",
    } <= found.spent.keys()


def test_steps_behind_a_rollback_are_undone(
    text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "MOST", 0.0)
    fault, guard = FaultConfig(kind="nan-gradient", step=16), GuardConfig(bad_step="rollback")
    ran = rehearse(tmp_path / "run", text_cache, fault, guard=guard)
    assert ran.error is None
    found = account(lines(ran.folder / GOODPUT))
    assert found is not None and found.undone == 4  # 13 to 16, as the event says
    own = [row for row in lines(ran.folder / GOODPUT) if 12 < row.get("step", 0) <= 16]
    until = next(i for i, row in enumerate(own) if row.get("back") == 12)
    lost = sum(round(1e6 * row["seconds"].get("steps", 0)) for row in own[: until + 1])
    assert found.spent["undone"] == lost > 0


def test_steps_beyond_the_checkpoint_of_a_restart_are_undone(
    text_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "MOST", 0.0)
    crash = FaultConfig(kind="nan-gradient", step=16)
    first = rehearse(tmp_path / "run", text_cache, crash)
    assert isinstance(first.error, FloatingPointError)
    before = account(lines(first.folder / GOODPUT))
    assert rehearse(tmp_path / "run", text_cache).error is None
    found = account(lines(first.folder / GOODPUT))
    assert before is not None and found is not None
    assert (before.undone, found.undone, found.starts) == (0, 4, 2)
    assert found.spent["undone"] > 0
