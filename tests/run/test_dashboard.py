"""What is drawn on a terminal: at two widths, without Unicode, and which view fits where."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from jaxmoe.run.dashboard import DOTS, ECHO, Dashboard, LiveDisplay, display, sparkline
from jaxmoe.run.progress import Plain, Quiet, Tally, View

VIEW = View(
    step=1180,
    steps=5000,
    tokens_per_second=9566.1,
    train_nll=1.471,
    bits_per_byte=1.825,
    mfu=0.182,
    load=(0.16, 2.06),
    dead=1,
    seconds_left=1820,
    forecast=(1.095, 1.049, 1.178),
    registered=(1.09,),
    expected=(1.45,),
    residual=-2.3,
    evaluated_at=1100,
    seconds=413,
    step_seconds=0.3211,
    grad_norm=1.64,
    lr=2.6e-4,
    loads=(0.16, 0.5, 1.0, 2.06),
    alarms=2,
    last_alarm="step 880, alarm: the train loss is far above the median of 128 steps before",
    restarts=1,
    resumed_from=800,
)
ROWS = ("speed", "loss", "gradient", "experts", "held-out", "expected", "forecast", "alarms")


def drawn(width: int, *views: View, encoding: str = "utf-8", **options: Any) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, file=file, force_terminal=True, color_system=None, **options)
    board = Dashboard("mine")
    for view in views:
        board.add(view)
    console.print(board)
    file.flush()
    return file.buffer.getvalue().decode(encoding).splitlines()  # pyright: ignore


def test_at_80_columns_there_is_a_line_for_each_thing() -> None:
    first = replace(VIEW, step=20, train_nll=5.0, bits_per_byte=3.0, evaluated_at=0)
    found = drawn(80, first, VIEW)
    assert {len(line) for line in found} == {80 - ECHO}
    text = [line.strip("\u2502 ") for line in found[1:-1]]
    assert text[0].startswith("step 1,180/5,000 ") and text[0].endswith("23%  30:20 left")
    assert [line[:10] + line[10:].split("   ")[0] for line in text[1:]] == [
        "speed     9,566 tok/s",
        "loss      1.471",
        "gradient  norm 1.64",
        "experts   0.16..2.06 of an even share",
        "held-out  1.825 bits per byte at step 1,100",
        "expected  1.450 at that step, registered",
        "forecast  1.095 [1.049, 1.178]",
        "alarms    2",
        "restarts  1",
    ]
    assert text[1].endswith("MFU 18%   0.321 s a step")
    assert text[2].endswith("\u2588\u2581")  # from 5.0 to 1.471
    assert text[4].endswith("1 dead   \u2582\u2583\u2584\u2588")
    assert text[6].endswith("-2.3 sigma")
    assert text[7].endswith("registered 1.090")
    assert "last at step 880, alarm: the train loss is far" in text[8]
    assert text[8].endswith("\u2026")  # cut, not folded
    assert text[9].endswith("last from step 800")
    assert "mine" in found[0] and "running for 6:53" in found[-1]


def test_at_160_columns_two_things_share_a_line() -> None:
    found = drawn(160, VIEW)
    assert {len(line) for line in found} == {160 - ECHO}
    assert len(found) == len(drawn(80, VIEW)) - 4
    (line,) = [line for line in found if " speed " in line]
    assert " held-out " in line
    text = "\n".join(found)
    assert all(f" {name} " in text for name in ROWS)


def test_what_is_not_known_yet_is_left_out() -> None:
    assert drawn(80) == []
    text = "\n".join(drawn(80, View(step=1, steps=10)))
    assert "step 1/10" in text and "not known yet" in text
    assert "alarms    none" in text and "restarts  none" in text
    assert "held-out" not in text and "forecast" not in text and "left" not in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    text = "\n".join(drawn(80, replace(VIEW, train_nll=2.0), VIEW, encoding="ascii"))
    assert "experts   0.16..2.06" in text and "#" in text


def test_curves_are_means_of_equal_parts() -> None:
    assert sparkline([0, 1, 2, 7], 8, DOTS) == "_.-#"
    assert sparkline([0, 2, 5, 9], 2, DOTS) == "_#"
    assert sparkline([1, 3, 10, 12], 2, DOTS, low=0.0) == ".#"  # means 2 and 11, from 0
    assert sparkline([math.nan, 3, 3], 8, DOTS) == "__"
    assert sparkline([3], 8, DOTS) == sparkline([], 8, DOTS) == ""
    assert len(sparkline([*range(1000)], 24, DOTS)) == 24


def test_alarms_of_steps_that_were_taken_again_count_once() -> None:
    tally = Tally()
    tally.add("start", 0, "")
    tally.add("alarm", 7, "far up")
    tally.add("skip", 9, "not finite")
    tally.add("checkpoint", 9, "saving began")
    tally.add("resume", 6, "from checkpoint 6")
    tally.add("alarm", 7, "far up")
    assert tally.known() == {
        "alarms": 2,
        "last_alarm": "step 7, alarm: far up",
        "restarts": 1,
        "resumed_from": 6,
    }


def test_a_run_that_was_never_restarted_says_so() -> None:
    tally = Tally()
    tally.add("start", 0, "")
    assert tally.known() == {
        "alarms": 0,
        "last_alarm": None,
        "restarts": 0,
        "resumed_from": None,
    }


def test_the_config_says_which_view(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where it says nothing, the terminal does."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: as if it were a terminal
    monkeypatch.setenv("TERM", "xterm")
    for mode, kind in (("plain", Plain), ("quiet", Quiet), ("auto", LiveDisplay)):
        view = display(mode, "mine", writes=True)
        assert type(view) is kind
        view.close()
    monkeypatch.setenv("TERM", "dumb")  # nothing can be drawn over there
    assert type(display("auto", "mine", writes=True)) is Plain
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TERM", "xterm")
    assert type(display("auto", "mine", writes=True)) is Plain
    view = display("live", "mine", writes=True)
    assert type(view) is LiveDisplay
    view.close()
    capsys.readouterr()


def test_a_quiet_view_says_what_somebody_should_look_at(capsys: Any) -> None:
    view = display("quiet", "mine", writes=True)
    view.note("compiled the step")
    view.show(VIEW)
    view.note("alarm: far up", alarm=True)
    view.close()
    assert capsys.readouterr().out == "alarm: far up\n"
