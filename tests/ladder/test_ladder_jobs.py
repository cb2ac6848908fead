"""Ladders as jobs of a scheduler: what it is handed, and what its signal before the end does."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxmoe.errors import UserError
from jaxmoe.ladder.__main__ import main
from jaxmoe.ladder.runner import submit

TOY = str(Path(__file__).parent / "toy.py")


def test_jobs_get_their_name_run_and_one_quoted_command(tmp_path: Path):
    show = "import sys; print(sys.argv[1:])"
    template = f"{sys.executable} -c '{show}' --job={{name}} --run={{run}} --wrap={{command}}"
    runs = {"rung-00": Path("/a b")}
    (said,) = submit(template, {"rung-00": ["python", "-m", "x", "--set", "a=b c"]}, runs)
    assert said == repr(["--job=rung-00", "--run=/a b", "--wrap=python -m x --set 'a=b c'"])
    with pytest.raises(UserError, match="exit code 3"):
        submit(
            f"{sys.executable} -c 'raise SystemExit(3)' {{command}}", {"a": ["b"]}, {"a": tmp_path}
        )


@pytest.mark.parametrize("answer", ["exit 75", "trap - USR1; kill -USR1 $$"], ids=["saved", "new"])
def test_a_ladder_that_is_asked_to_end_asks_the_run_and_starts_no_other(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """SIGUSR1, as a scheduler sends it: with 75, also where the run had not begun to train."""
    fake = tmp_path / "python"
    end = f"rm {tmp_path}/up; {answer}"
    wait = "while :; do sleep 0.05; done"
    fake.write_text(f"#!/bin/bash\ntrap '{end}' USR1\ntouch {tmp_path}/up\n{wait}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    before = signal.getsignal(signal.SIGUSR1)

    def ask() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask).start()
    out = tmp_path / "out"
    assert main(["run", "--family", TOY, "--rungs", "0..1", "--out", str(out)]) == 75
    assert "rung-00-seed-0: asked to end, its state is saved" in capsys.readouterr().err
    assert not (tmp_path / "up").exists()  # the run was asked, and no other begun
    assert signal.getsignal(signal.SIGUSR1) == before


def test_slurm_is_the_script_of_the_launch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """From wherever it was said, with the run whose steps are progress."""
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/bash\nprintf '%s|' \"$@\"\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--family", TOY, "--rungs", "2..3", "--out", "out", "--slurm"]) == 0
    for line, rung in zip(capsys.readouterr().out.splitlines(), (2, 3), strict=True):
        name, script, *rest = line.partition(": ")[2].split("|")
        assert name == f"--job-name=rung-0{rung}-seed-0" and Path(script).name == "slurm.sh"
        assert os.access(script, os.X_OK)
        run = tmp_path / "out" / "runs" / f"rung-0{rung}-seed-0"
        assert rest[:3] == ["--run-dir", str(run), "--command"]
        assert rest[3].endswith(f"--rungs {rung} --seeds 0..0")
