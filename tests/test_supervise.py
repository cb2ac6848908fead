"""The supervisor: what is run again, what never is, and when it gives up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

from jaxmoe import exits, supervise
from jaxmoe.supervise import furthest_step, main

# A command that adds a step's line to the record and ends as its list of codes says.
FAKE = """
import json, os, signal, sys
from pathlib import Path
run, codes = Path(sys.argv[1]), json.loads(sys.argv[2])
run.mkdir(exist_ok=True)
count = run / "count"
n = int(count.read_text()) if count.exists() else 0
count.write_text(str(n + 1))
code, step = codes[min(n, len(codes) - 1)]
with open(run / "metrics.jsonl", "a") as out:
    out.write(json.dumps({"step": step}) + "\\n")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits of hundredths of a second, and this process' own handlers back afterwards."""
    monkeypatch.setattr(supervise, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(supervise, "LONGEST_WAIT", 0.02)
    before = {one: signal.getsignal(one) for one in (*exits.REQUESTS, signal.SIGINT)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def command(run: Path, *ends: tuple[int, int]) -> list[str]:
    return [sys.executable, "-c", FAKE, str(run), json.dumps(ends)]


def starts(run: Path) -> int:
    return int((run / "count").read_text())


def supervised(run: Path, *ends: tuple[int, int]) -> int:
    return main(["--run-dir", str(run), "--", *command(run, *ends)])


def test_faults_are_run_again_until_it_is_done(tmp_path: Path) -> None:
    """Tracebacks, kills and codes that nobody knows, as long as each start gets further."""
    run = tmp_path / "run"
    ends = [(1, 3), (-9, 7), (139, 9), (-signal.SIGSEGV, 12), (1, 15), (0, 20)]
    assert supervised(run, *ends) == 0
    assert starts(run) == 6


@pytest.mark.parametrize("code", [0, 2, 3, 75, 130])
def test_what_a_restart_cannot_help_ends_with_its_own_code(code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert supervised(run, (code, 5)) == code
    assert starts(run) == 1


def test_it_gives_up_at_the_third_fault_without_a_step_forward(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A step forward sets the count back; one that is only reached again does not."""
    run = tmp_path / "run"
    assert supervised(run, (1, 5), (1, 4), (1, 5), (1, 6), (-9, 6), (1, 2), (1, 6)) == 4
    assert starts(run) == 7
    said = capfd.readouterr().err
    assert "exit code 1 at step 6: 3 faults in a row with nothing beyond it, giving up" in said
    assert "signal SIGKILL at step 6 (1 of 3 without a step forward); again in" in said


def test_patience_can_be_chosen(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--run-dir", str(run), "--patience", "1", "--", *command(run, (1, 0))]
    assert main(words) == 4
    assert starts(run) == 1


def test_waits_double_up_to_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(supervise._Child, "pause", lambda _, s: bool(waits.append(s)) or True)
    monkeypatch.setattr(supervise, "FIRST_WAIT", 1.0)
    monkeypatch.setattr(supervise, "LONGEST_WAIT", 5.0)
    monkeypatch.setattr(supervise, "JITTER", 0.0)
    run = tmp_path / "run"
    ends = [(1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 2), (1, 2), (0, 2)]
    assert main(["--run-dir", str(run), "--patience", "9", "--", *command(run, *ends)]) == 0
    assert waits == [1, 2, 4, 5, 5, 1, 2]


def test_the_furthest_step_is_of_the_log_or_a_checkpoint(tmp_path: Path) -> None:
    assert furthest_step(tmp_path / "none") == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 9}\n{"st')
    assert furthest_step(tmp_path) == 9
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    (tmp_path / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    assert furthest_step(tmp_path) == 12
    (tmp_path / "events.jsonl").write_text('{"step": 13, "what": "crash"}\n')
    assert furthest_step(tmp_path) == 13


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--"], "say what to run"),
        (["--", "true"], "the command has no --run-dir"),
        (["--run-dir", "x", "--", "no-such-command"], "cannot run no-such-command: No such file"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_the_run_directory_is_that_of_the_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["--", *command(run, (2, 1)), "--run-dir", str(run)]) == 2
    assert main(["--", *command(run, (2, 1)), f"--run-dir={run}"]) == 2
    assert starts(run) == 2


DEAF = """
import sys, time
from pathlib import Path
Path(sys.argv[1], "ready").write_text("")
time.sleep(60)
"""
SLOW = """
import signal, sys, time
from pathlib import Path
def asked(number, frame):
    Path(sys.argv[1], "asked").write_text(signal.Signals(number).name)
    sys.exit(75)
for one in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(one, asked)
Path(sys.argv[1], "ready").write_text("")
time.sleep(60)
"""


def test_a_command_that_had_not_begun_ends_by_the_request_and_is_to_be_run_again(
    tmp_path: Path,
) -> None:
    inner = [sys.executable, "-c", DEAF, str(tmp_path)]
    words = [sys.executable, "-m", "jaxmoe.supervise", "--run-dir", str(tmp_path), "--", *inner]
    with subprocess.Popen(words, cwd=ROOT, start_new_session=True) as process:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_requests_are_passed_on_and_end_it(number: int, code: int, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of a terminal, so the command hears it by itself."""
    inner = [sys.executable, "-c", SLOW, str(tmp_path)]
    words = [sys.executable, "-m", "jaxmoe.supervise", "--run-dir", str(tmp_path), "--", *inner]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)
    try:
        while not (tmp_path / "ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
        process.communicate()
    if number != signal.SIGINT:
        assert (tmp_path / "asked").read_text() == signal.Signals(number).name


def test_a_smaller_size_is_taken_only_where_the_wanted_one_gets_no_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Size 4 faults at step 5 (progress: 4 again), then without a step: 2, then 1; that one gets
    further before it faults: 4 once more."""
    run = tmp_path / "run"
    ends = ((1, 5), (1, 5), (1, 5), (1, 9), (0, 12))
    told = [*command(run, *ends), "{n}"]
    note = 'open(run / "sizes", "a").write(sys.argv[3] + " ")\nif code < 0:'
    told[2] = FAKE.replace("if code < 0:", note)
    assert main(["--run-dir", str(run), "--sizes", "4,2,1", "--", *told]) == 0
    assert (run / "sizes").read_text().split() == ["4", "4", "2", "1", "4"]
    assert "again in 0.0 s, of size 2" in capsys.readouterr().err


def test_a_size_that_is_a_mistake_is_passed_over(tmp_path: Path) -> None:
    """Three do not divide the batch, say; a mistake at the wanted size is one."""
    run = tmp_path / "run"
    told = [*command(run, (1, 5), (1, 5), (2, 5), (0, 9)), "{n}"]
    assert main(["--run-dir", str(run), "--sizes", "4,3,2", "--", *told]) == 0
    assert starts(run) == 4
    other = tmp_path / "other"
    told = [*command(other, (2, 5)), "{n}"]
    assert main(["--run-dir", str(other), "--sizes", "4,3,2", "--", *told]) == 2


@pytest.mark.parametrize(
    ("sizes", "word", "said"),
    [
        ("2,1", "x", "belong together"),
        (None, "{n}", "belong together"),
        ("2,one", "{n}", "write them as 4,2,1"),
        ("2,0", "{n}", "write them as 4,2,1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    sizes: str | None, word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if sizes is None else ["--sizes", sizes]
    assert main(["--run-dir", str(tmp_path), *given, "--", "true", word]) == 2
    assert said in capsys.readouterr().err
