"""Kill -9 at random moments, of real runs, again and again: nothing is lost.

`make chaos` kills a hundred times and more (JAXMOE_KILLS in all); here it is a few.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from processes import (
    PATIENCE,
    alive,
    finish,
    lines,
    local,
    logged,
    metrics,
    rank,
    started,
    train,
    wait_until,
)

from jaxmoe.run import record, seal
from jaxmoe.run.checkpoint import ITEMS

pytestmark = pytest.mark.multiprocess

KILLS = int(os.environ.get("JAXMOE_KILLS", "24"))
# Saved so often that a kill mostly meets a checkpoint that is being written.
OFTEN = {
    "checkpoint.every": 3,
    "checkpoint.keep": 3,
    "eval.every": 20,
    "forecast.first": 200,
    "forecast.every": 200,
}


def sized(kills: int, processes: int) -> tuple[str, ...]:
    """A run that is long enough for so many kills: a start of one process gets some 15 steps ahead,
    one of two some 8."""
    steps = 100 + (30 if processes == 1 else 16) * kills
    own = OFTEN | {"train.steps": steps}
    return tuple(word for k, v in own.items() for word in ("--set", f"{k}={v}"))


def check_end(group: int) -> None:
    """Nothing of a run lives on; what was killed may take a moment to go."""
    end = time.monotonic() + 10
    while left := alive(group):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def check_checkpoints(run_dir: Path) -> int:
    """Each that is visible is whole, but for an old one that was being deleted; how many were being
    written."""
    folder = run_dir / record.CHECKPOINTS
    for step in record.checkpoint_steps(run_dir)[-OFTEN["checkpoint.keep"] :]:
        assert seal.problem(folder / str(step), ITEMS) is None, step
    return sum(not f.name.isdigit() for f in folder.glob("*")) if folder.exists() else 0


def killed_again_and_again(
    command: list[str], run_dir: Path, text_cache: Path, kills: int, *, one_rank: bool
) -> dict[str, int]:
    """Kills the run so many times; what was met."""
    rng, log = random.Random(kills), run_dir.parent / "log"
    met = {"kills": 0, "in a save": 0, "before a step": 0, "steps lost": 0}
    for _ in range(kills):
        before = logged(run_dir)
        with started(command, text_cache, log) as process:
            if rng.random() < 0.15:  # while it starts, or resumes: the end of the block kills all
                time.sleep(rng.uniform(0.5, 4.0))
            else:
                known = len(lines(run_dir / record.EVENTS))
                new = lambda n=known: len(lines(run_dir / record.EVENTS)) >= n + 3  # noqa: E731
                wait_until(process, new, log)
                time.sleep(rng.uniform(0, 0.3))
                if one_rank:  # the launcher ends the other one
                    os.kill(rank(process, rng.randrange(2)), signal.SIGKILL)
                    assert process.wait(timeout=PATIENCE) not in (0, 2, 75)
        check_end(process.pid)
        met["kills"] += 1
        met["in a save"] += check_checkpoints(run_dir) > 0
        met["before a step"] += logged(run_dir) == before
        steps = record.checkpoint_steps(run_dir)
        met["steps lost"] += logged(run_dir) - (steps[-1] if steps else 0)
    return met


def chaos(folder: Path, text_cache: Path, kills: int, *, processes: int) -> None:
    whole, broken = folder / "whole", folder / "broken"

    def command(run_dir: Path) -> list[str]:
        own = sized(kills, processes)
        return train(run_dir, *own) if processes == 1 else local(processes, run_dir, *own)

    finish(command(whole), text_cache, 10 * PATIENCE)
    began = time.monotonic()
    met = killed_again_and_again(command(broken), broken, text_cache, kills, one_rank=processes > 1)
    finish(command(broken), text_cache, 10 * PATIENCE)
    met["seconds"] = round(time.monotonic() - began)
    print(json.dumps({"processes": processes, **met}))
    assert metrics(broken) == metrics(whole)
    assert (broken / record.EVALS).read_bytes() == (whole / record.EVALS).read_bytes()
    assert check_checkpoints(broken) == 0
    starts = [r for r in lines(broken / record.EVENTS) if r["what"] in ("start", "resume")]
    assert len(starts) > kills / 2 and met["kills"] == kills


def test_a_few_kills_lose_nothing(text_cache: Path, tmp_path: Path) -> None:
    chaos(tmp_path, text_cache, 4, processes=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes", [1, 2])
def test_many_kills_lose_nothing(processes: int, text_cache: Path, tmp_path: Path) -> None:
    """A quarter of the kills on two processes, whose start takes four times as long."""
    two = KILLS // 4
    chaos(tmp_path, text_cache, two if processes == 2 else KILLS - two, processes=processes)
