"""docs/tutorial.md, as a reader goes through it: every file written, every command run, in order.

With a twentieth of the tokens to train on and a twelfth to evaluate, so that it takes a minute.
"""

import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import ROOT, events, finish, kill_group, lines, started, wait_until

from jaxmoe.run.record import checkpoint_steps

TEXT = (ROOT / "docs" / "tutorial.md").read_text()
STEP = re.compile(
    r"Write `(?P<file>[\w/.]+)`:\n\n```python\n(?P<code>[^`]*)```|^    (?P<line>\S.*)$", re.M
)
LESS = {  # of what the processor is for
    "    80  # bytes": "    4  # bytes",  # configs/ladder.py, tokens a parameter
    "tokens=60_000": "tokens=5_000",  # of an evaluation
}
LAUNCH = "launch/local.sh 2 --config configs/mine.py:target --run-dir runs/mine"

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]


@dataclass
class Walk:
    """A folder that looks like a clone, and what each command said there."""

    folder: Path
    text_cache: Path
    said: dict[str, str] = field(default_factory=dict)
    run: list[str] = field(default_factory=list)

    @property
    def mine(self) -> Path:
        return self.folder / "runs" / "mine"

    def shell(self, command: str) -> list[str]:
        """With the Python of this suite in front, as the tutorial puts that of .venv."""
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        words = [f"{name}={value}" for name, value in own.items()]
        return ["env", "-C", str(self.folder), *words, "bash", "-c", command]

    def take(self, command: str) -> None:
        self.said[command] = finish(self.shell(command), self.text_cache, 400)
        self.run.append(command)

    def take_and_kill(self, command: str) -> None:
        """kill -9 of both processes, once there is a checkpoint to go on from."""
        log = self.folder / "log"

        def saved() -> bool:
            time.sleep(0.05)
            return bool(checkpoint_steps(self.mine))  # by their last name: whole

        with started(self.shell(command), self.text_cache, log) as process:
            wait_until(process, saved, log)
            kill_group(process)
        self.run.append(command)


def less(code: str) -> str:
    (told,) = (one for one in LESS if one in code)
    return code.replace(told, LESS[told])


@pytest.fixture(scope="module")
def walk(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = tmp_path_factory.mktemp("tutorial")
    for part in ("configs", "launch"):
        shutil.copytree(ROOT / part, folder / part)
    recipe = folder / "configs" / "ladder.py"
    recipe.write_text(less(recipe.read_text()))
    walk = Walk(folder, text_cache)
    for step in STEP.finditer(TEXT):
        if step["file"]:
            (folder / step["file"]).write_text(less(step["code"]))
        elif step["line"].startswith("export PATH="):
            assert step["line"] == "export PATH=$PWD/.venv/bin:$PATH"
        elif step["line"] == LAUNCH and LAUNCH not in walk.run:
            walk.take_and_kill(step["line"])
        else:
            walk.take(step["line"])
    return walk


def test_every_command_was_run_in_its_order(walk: Walk):
    """Twice the launcher: killed, and taken up again."""
    assert walk.run.count(LAUNCH) == 2
    done = [word for one in walk.run for word in re.findall(r"^(?:python -m )?(\S+)", one)]
    assert done[1:5] == ["jaxmoe.data"] * 4
    assert len(walk.run) == len(re.findall(r"^    (?:python|launch)", TEXT, re.M)) >= 16


def test_the_data_set_has_what_the_tutorial_says(walk: Walk):
    manifest = json.loads((walk.folder / "data" / "mine" / "manifest.json").read_text())
    (compared,) = manifest["overlap"].values()
    assert list(compared) == [manifest["sources"]["mine"]["fingerprint"]]
    assert manifest["sources"]["mine"]["tokens"] > 5_000_000


def test_the_forecast_was_there_first_and_is_whole(walk: Walk):
    """Before the start, of four rungs; the outcome is scored against it."""
    first = lines(walk.mine / "forecasts.jsonl")[0]
    assert (first["step"], len(first["siblings"])) == (0, 4)
    begun = events(walk.mine, "start")
    assert len(begun) == 1 and first["time"] < begun[0]["time"]
    assert first["loss"]["q05"] < lines(walk.mine / "evals.jsonl")[-1]["nll"] < 3.5
    assert "before the start" in walk.said["python -m jaxmoe.forecast score runs/mine"]


def test_the_killed_run_went_on_with_both_processes(walk: Walk):
    (resumed,) = events(walk.mine, "resume")
    assert resumed["step"] > 0
    assert "done in " in walk.said[LAUNCH]
    assert json.loads((walk.mine / "environment.json").read_text())["mesh"]["data"] == 2


def test_the_page_and_the_picture_are_there(walk: Walk):
    page = (walk.mine / "report.html").read_text()
    assert "Before its start the forecast of the final held-out loss" in page and "rung" in page
    assert (walk.mine / "ladder.svg").read_text().startswith("<svg")
