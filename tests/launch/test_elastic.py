"""A job that loses a machine goes on with the others, and comes back to its size."""

import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import LOCAL, SMALL, events, finish, metrics

pytestmark = pytest.mark.multiprocess

# A job of size 2 cannot start while a machine is lost; one of size 1 brings it back when it ends.
JOB = """#!/usr/bin/env bash
if [ "$1" = 2 ] && [ -e "$LOST" ]; then echo "a machine is lost" >&2; exit 1; fi
if [ "$1" = 2 ]; then touch "$LOST"; else rm -f "$LOST"; fi
exec "$@"
"""


def test_a_lost_process_is_done_without_and_comes_back(
    straight: Path, text_cache: Path, tmp_path: Path
) -> None:
    """2 x 4 devices, then 1 x 4, then 2 x 4: the same batches in the same order, losses to 1e-5."""
    run_dir, job = tmp_path / "run", tmp_path / "job"
    job.write_text(JOB.replace("$LOST", str(tmp_path / "lost")).replace('"$@"', f'{LOCAL} "$@"'))
    job.chmod(job.stat().st_mode | stat.S_IXUSR)
    kills = [{"kind": "kill", "step": 9, "rank": 1}, {"kind": "kill", "step": 21}]
    mesh = ("--set", "mesh.expert=2", "--set", "mesh.model=2", "--set", "mesh.emulate=4")
    own = ("--config", str(SMALL), "--run-dir", str(run_dir), *mesh)
    supervise = [sys.executable, "-m", "jaxmoe.supervise", "--sizes", "2,1"]
    command = [*supervise, "--", str(job), "{n}", *own, "--set", f"faults={json.dumps(kills)}"]
    finish(command, text_cache)
    first, second = (row["step"] for row in events(run_dir, "resume"))
    assert first == 6 and second in (12, 18)  # 18 is being written when the kill comes
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["mesh"]["data"] == 2 and "2 processes" in environment["devices"]
    mine, theirs = metrics(run_dir), metrics(straight)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for name in ("train/nll", "tokens", "train/lr"):
        np.testing.assert_allclose(
            [row[name] for row in mine], [row[name] for row in theirs], rtol=1e-5, err_msg=name
        )
