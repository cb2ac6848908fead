"""launch/tpu.sh with a `gcloud` that runs the command here, once for each worker.

It ends as the real one does (SDK 528, tpu_vm/ssh.py): with the status of the first worker that
failed, each told in a line.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, kill_group

TPU = ROOT / "launch" / "tpu.sh"

GCLOUD = """#!{python}
import json, os, subprocess, sys
at = os.environ["FAKE"]
with open(os.path.join(at, "calls.jsonl"), "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
[command] = [word[10:] for word in sys.argv if word.startswith("--command=")]
workers = []
for k in range(2):
    env = dict(os.environ, HOME=os.path.join(at, f"worker-{{k}}"), WORKER=str(k))
    workers.append(subprocess.Popen(["bash", "-c", command], env=env, cwd=env["HOME"]))
codes = [one.wait() for one in workers]
for k, code in enumerate(codes):
    if code:
        print(f"##### Command execution on worker {{k}} failed with exit status {{code}}."
              " Continuing.", file=sys.stderr)
sys.exit(next((code for code in codes if code), 0))
"""

# Stands for python on a worker: notes what it was asked, and ends as ENDS says, or when asked to.
PYTHON = """#!{python}
import json, os, signal, sys, time
with open(os.path.expanduser("~/argv"), "w") as file:
    json.dump([os.getcwd(), *sys.argv[1:]], file)
code = os.environ["ENDS"].split(",")[int(os.environ["WORKER"])]
if code != "wait":
    sys.exit(int(code))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75 if os.environ["WORKER"] == "1" else 1))
open(os.path.expanduser("~/ready"), "w").close()
time.sleep(60)
"""


@pytest.fixture
def slice_of_two(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose gcloud knows one slice of two workers."""
    for name, text in (("gcloud", GCLOUD), ("python", PYTHON)):
        file = tmp_path / name
        file.write_text(text.format(python=sys.executable))
        file.chmod(0o755)
    for k in range(2):
        (tmp_path / f"worker-{k}" / "check out").mkdir(parents=True)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "TPU": "mine",
        "ZONE": "us-east5-a",
        "DIR": "check out",
        "PYTHON": str(tmp_path / "python"),
        "ENDS": "0,0",
    }


def launch(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(TPU), *args], env=env, capture_output=True, text=True, timeout=60)


def calls(env: dict[str, str]) -> list[list[str]]:
    return [json.loads(row) for row in (Path(env["FAKE"]) / "calls.jsonl").read_text().splitlines()]


def trainer(home: Path) -> Path:
    """Of a worker, in /proc while it lives."""
    return Path("/proc") / (home / ".jaxmoe.pid").read_text().strip()


def test_all_workers_get_the_arguments_as_they_were_given(slice_of_two: dict[str, str]) -> None:
    """Through this shell, gcloud's words and the workers' shells: spaces, quotes, JSON, dollars."""
    args = ["--set", 'faults=[{"kind":"kill","step":120}]', "--set", "data.holdout=('a b',\"c\")"]
    args += ["--run-dir", "/mnt/my runs/$HOME `x`; exit 9", "--set", "", "a\nb"]
    done = launch(slice_of_two, *args)
    assert done.returncode == 0, done.stderr
    [[*words, command]] = calls(slice_of_two)
    where = ["mine", "--worker=all", "--zone=us-east5-a"]
    assert words == ["compute", "tpus", "tpu-vm", "ssh", *where]
    assert command.startswith("--command=")
    for k in range(2):
        home = Path(slice_of_two["FAKE"]) / f"worker-{k}"
        seen = json.loads((home / "argv").read_text())
        assert seen == [str(home / "check out"), "-m", "jaxmoe.train", *args]


def test_project_and_more_words_for_gcloud(slice_of_two: dict[str, str]) -> None:
    env = slice_of_two | {"PROJECT": "p", "GCLOUD_FLAGS": "--internal-ip --plain", "ZONE": ""}
    assert launch(env).returncode == 0
    [words] = calls(env)
    assert words[4:-1] == ["mine", "--worker=all", "--project=p", "--internal-ip", "--plain"]


@pytest.mark.parametrize(
    "ends, code", [("0,2", 2), ("1,6", 1), ("1,75", 75), ("3,0", 3), ("143,143", 143)]
)
def test_the_exit_code_is_the_first_workers_but_75_wins(
    slice_of_two: dict[str, str], ends: str, code: int
) -> None:
    """After a 75 the others may have missed the coordinator; 143 unasked is a fault."""
    assert launch(slice_of_two | {"ENDS": ends}).returncode == code


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, "--end"])
def test_a_request_to_end_reaches_the_workers_and_is_answered_75(
    slice_of_two: dict[str, str], how: signal.Signals | str
) -> None:
    env = slice_of_two | {"ENDS": "wait,wait"}
    # A suite that was started in the background ignores SIGINT, and so would a shell below; a
    # `preexec_fn` would run between fork and exec of a process whose JAX has threads.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    command = [sys.executable, "-c", f"{heard}; os.execv(sys.argv[1], sys.argv[1:])", str(TPU)]
    with subprocess.Popen(command, env=env, start_new_session=True, text=True) as process:
        try:
            homes = [Path(env["FAKE"]) / f"worker-{k}" for k in range(2)]
            end = time.monotonic() + 30
            while not all((home / "ready").exists() for home in homes):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            again = launch(env)
            assert again.returncode == 2 and "alive on this worker" in again.stderr
            if isinstance(how, str):
                assert launch(env, how).returncode == 0
            elif how == signal.SIGINT:  # as a terminal sends it, to the whole group
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            assert process.wait(timeout=30) == 75
        finally:
            kill_group(process)
            left = [one for home in homes if (one := trainer(home)).exists()]
            for one in left:  # in a group of their own
                os.kill(int(one.name), signal.SIGKILL)
        assert not left
    assert "no run here" in launch(env, "--end").stderr


def test_any_command_runs_on_all_workers(slice_of_two: dict[str, str]) -> None:
    done = launch(slice_of_two, "--", "echo", "it's  here:", "$WORKER")
    assert done.returncode == 0
    assert done.stdout == "it's  here: $WORKER\n" * 2
    assert launch(slice_of_two, "--", "bash", "-c", "exit $WORKER").returncode == 1


def test_mistakes_are_told_in_one_line(slice_of_two: dict[str, str], tmp_path: Path) -> None:
    done = launch(slice_of_two | {"TPU": ""})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "TPU=NAME" in done.stderr
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "env", "sed"):  # and no gcloud
        [found] = [p for p in ("/usr/bin", "/bin") if (Path(p) / name).exists()][:1]
        (bare / name).symlink_to(Path(found) / name)
    done = launch(slice_of_two | {"PATH": str(bare)})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "gcloud is not on PATH" in done.stderr


def test_help_shows_the_examples_and_needs_nothing() -> None:
    done = subprocess.run([str(TPU), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("TPU=NAME", "--end", "jaxmoe.supervise", "75"):
        assert word in done.stdout
    assert "set -u" not in done.stdout
