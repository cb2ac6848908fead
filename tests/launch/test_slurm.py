"""launch/slurm.sh on a real Slurm of four virtual nodes (slurm_cluster.py)."""

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import PATIENCE, ROOT, SMALL, events, lines, logged, metrics
from slurm_cluster import SCRIPT, Cluster, fetched

pytestmark = pytest.mark.slurm

TOY = ROOT / "tests" / "ladder" / "toy.py"
TWO = ("--set", "mesh.data=2")
# Stands in for Python where only the script is tried: jaxmoe.restarts is the real one, training
# is one line of a shell.
FAKE = """#!/usr/bin/env bash
[ "$2" = jaxmoe.restarts ] && exec {python} "$@"
echo "process $JAXMOE_PROCESS_ID of $JAXMOE_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: ${{*: -2}}"
{does}
"""


@pytest.fixture(scope="module")
def cluster(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Up in a second or two; at the end nothing of it is left, nor of any job."""
    it = Cluster(tmp_path_factory.mktemp("slurm"), fetched(text_cache.parent), text_cache)
    try:
        it.start()
        yield it
    finally:
        it.stop()


def gone(cluster: Cluster) -> bool:
    """No process of a job runs on any node."""
    return not [pid for node in cluster.nodes for pid in cluster.of_node(node)]


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """Whatever a case did: when its jobs are over, so are their processes, on every node."""
    yield
    try:
        cluster.wait(lambda: gone(cluster), "the end of all processes of jobs", seconds=30)
    finally:  # what a case that failed has left is not in the next one's way
        cluster.run("scancel", "--me")


def fake(folder: Path, does: str) -> str:
    file = folder / "python"
    file.write_text(FAKE.format(python=sys.executable, does=does))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def equal(run_dir: Path, straight: Path) -> None:
    """Each step once, and as one process computes it."""
    mine, theirs = metrics(run_dir), metrics(straight)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for name in ("train/nll", "train/lr", "tokens"):
        np.testing.assert_allclose(
            [row[name] for row in mine], [row[name] for row in theirs], rtol=1e-5, err_msg=name
        )
    last = [lines(run / "evals.jsonl")[-1]["nll"] for run in (run_dir, straight)]
    np.testing.assert_allclose(last[0], last[1], rtol=1e-5)


@pytest.mark.timeout(600)
def test_its_time_is_over_and_it_comes_back(
    cluster: Cluster, straight: Path, tmp_path: Path
) -> None:
    """2 nodes x 1 task, a limit of two minutes and steps that would take longer: saved and
    requeued by the signal of the real limit, and equal to one process in the end."""
    run_dir = tmp_path / "run"
    slow = '[{"kind":"slow","step":8,"seconds":5,"steps":16}]'
    own = ("--config", str(SMALL), "--run-dir", str(run_dir), *TWO, "--set", f"faults={slow}")
    limit = ("--nodes=2", "--time=2", "--signal=B:USR1@60")
    job = cluster.submit(*limit, str(SCRIPT), *own, JAXMOE_LOOPBACK="1")
    assert cluster.finished(job, 2 * PATIENCE) == ("COMPLETED", 0), cluster.output(job)
    told = events(run_dir, "preemption")
    assert told and "asked to end" in told[0]["why"] or "SIGUSR1" in told[0]["why"]
    assert [row["step"] for row in events(run_dir, "resume")][0] == told[0]["step"]
    assert int(cluster.shown(job)["Restarts"]) >= 1
    equal(run_dir, straight)
    said = cluster.output(job)  # of all starts, one after the other
    assert "start 1: 2 nodes x 1 processes" in said and "start 2: 2 nodes" in said
    assert "ended with 75 (asked to end, state saved); the job is requeued" in said
    assert "2 x cpu, 2 processes" in said and not list(tmp_path.glob("run.starts-*"))


@pytest.mark.timeout(600)
def test_a_task_crashes_then_a_node_dies_and_the_run_ends_as_one_process(
    cluster: Cluster, straight: Path, tmp_path: Path
) -> None:
    """Rank 1 is killed before step 9; in the next start all of a node is, daemon and steps."""
    run_dir = tmp_path / "run"
    faults = '[{"kind":"kill","step":9,"rank":1},{"kind":"slow","step":14,"seconds":3,"steps":10}]'
    own = ("--config", str(SMALL), "--run-dir", str(run_dir), *TWO, "--set", f"faults={faults}")
    job = cluster.submit("--nodes=2", str(SCRIPT), *own, JAXMOE_LOOPBACK="1")
    cluster.wait(lambda: logged(run_dir) >= 14, "step 14", 2 * PATIENCE)
    assert "ended with" in (first := cluster.output(job)) and "a fault); the job is" in first
    assert [row["step"] for row in events(run_dir, "resume")] == [6]
    second = cluster.say("scontrol", "show", "hostnames", cluster.shown(job)["NodeList"]).split()[1]
    cluster.kill_node(second)
    assert cluster.of_node(second) == []
    assert cluster.finished(job, 2 * PATIENCE) == ("COMPLETED", 0), cluster.output(job)
    assert [row["step"] for row in events(run_dir, "resume")] == [6, 12]
    assert second not in cluster.shown(job)["NodeList"]  # it is down, and the others did it
    equal(run_dir, straight)
    cluster.start_node(second)
    cluster.wait_for_nodes()


def test_tasks_of_a_step_find_each_other_and_a_script_is_alone(cluster: Cluster) -> None:
    """Without launch/slurm.sh: JAX's own detection under srun, and none beside it."""
    code = (
        "from jaxmoe.run import joining; import jax; found = joining.find();"
        "n = joining.join(found, 10) if found else 1;"
        "print('joined', n, 'as', jax.process_index(), flush=True)"
    )
    file = cluster.jobs / "plain.sh"
    python = f'{sys.executable} -c "{code}"'
    file.write_text(f"#!/bin/bash\n{python}\nsrun --ntasks=1 --nodes=1 {python}\nsrun {python}\n")
    job = cluster.submit("--nodes=2", "--ntasks=2", str(file), PYTHONPATH=str(ROOT))
    assert cluster.finished(job) == ("COMPLETED", 0), cluster.output(job)
    said = [line for line in cluster.output(job).splitlines() if line.startswith("joined")]
    assert sorted(said) == ["joined 1 as 0", "joined 1 as 0", "joined 2 as 0", "joined 2 as 1"]


def test_each_rung_of_a_ladder_is_a_job(cluster: Cluster, tmp_path: Path) -> None:
    template = f"sbatch --parsable --job-name={{name}} {SCRIPT} --run-dir {{run}} --command"
    words = ["run", "--family", str(TOY), "--rungs", "0..1", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "jaxmoe.ladder", *words, "--submit", f"{template} {{command}}"]
    said = cluster.say(*command, PYTHONPATH=str(ROOT))
    jobs = [line.rpartition(": ")[2] for line in said.splitlines()]
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "rung-00-seed-0",
        "rung-01-seed-0",
    ]
    for job in jobs:
        assert cluster.finished(job) == ("COMPLETED", 0), cluster.output(job)
    rows = lines(tmp_path / "out" / "records.jsonl")
    assert sorted(row["rung"] for row in rows) == [0, 1]
    assert cluster.shown(jobs[1])["JobName"] == "rung-01-seed-0"
    assert not list((tmp_path / "out" / "runs").glob("*.starts-*"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "model.d_modle=3"], 2, "jaxmoe.restarts: "),
        (["--tasks", "gpu"], 2, "--tasks gpu, and the job has no --gpus-per-node=N"),
        (["--tasks", "core"], 2, "--tasks 'core': it is node or gpu"),
        (["--command", "true"], 2, "--command runs one process, and this job has 2 nodes"),
    ],
    ids=["config", "no-gpus", "tasks", "command"],
)
def test_a_mistake_is_told_once_and_not_requeued(
    cluster: Cluster, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    own = ["--config", str(SMALL), "--run-dir", str(tmp_path / "run")]
    first = words if words[0] == "--tasks" else []
    rest = words if words[0] != "--tasks" else []
    job = cluster.submit("--nodes=2", str(SCRIPT), *first, *own, *rest, JAXMOE_LOOPBACK="1")
    assert cluster.finished(job) == ("FAILED", code)
    assert cluster.output(job).count(said) == 1 and "Traceback" not in cluster.output(job)
    assert cluster.shown(job)["Restarts"] == "0" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [{}, {"JAX_COORDINATOR_ADDRESS": "localhost:1234"}], ids=str)
def test_nodes_do_not_meet_at_loopback(
    cluster: Cluster, tmp_path: Path, own: dict[str, str]
) -> None:
    """Each would find itself there, and wait for the others in vain."""
    run = ("--run-dir", str(tmp_path / "run"))
    job = cluster.submit("--nodes=2", str(SCRIPT), *run, **own)
    assert cluster.finished(job) == ("FAILED", 2)
    assert "2 nodes cannot meet at " in cluster.output(job)
    alone = cluster.submit("--nodes=1", str(SCRIPT), *run, PYTHON=fake(tmp_path, ""), **own)
    assert cluster.finished(alone) == ("COMPLETED", 0), cluster.output(alone)


def test_faults_without_a_step_forward_come_to_an_end(cluster: Cluster, tmp_path: Path) -> None:
    """One task crashes, and the other would wait for it for ever."""
    does = '[ "$JAXMOE_PROCESS_ID" = 1 ] || exec sleep 1000; exec sh -c "kill -9 \\$\\$"'
    python = fake(tmp_path, does)
    own = {"PYTHON": python, "JAXMOE_LOOPBACK": "1", "JAXMOE_PATIENCE": "2"}
    job = cluster.submit("--nodes=2", str(SCRIPT), "--run-dir", str(tmp_path / "run"), **own)
    assert cluster.finished(job) == ("FAILED", 4), cluster.output(job)
    said = cluster.output(job)
    assert "2 starts in a row with nothing beyond step 0, giving up" in said
    assert "start 2: 2 nodes" in said and cluster.shown(job)["Restarts"] == "1"
    assert "process 1 of 2 at 127.0.0.1:" in said and f"--run-dir {tmp_path / 'run'}" in said


def test_a_code_that_all_tasks_share_is_that_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """The first task to end does not cut the other short, whose record is still being written."""
    does = f'[ "$JAXMOE_PROCESS_ID" = 0 ] && sleep 1 && touch {tmp_path}/written; exit 3'
    own = {"PYTHON": fake(tmp_path, does), "JAXMOE_LOOPBACK": "1"}
    job = cluster.submit("--nodes=2", str(SCRIPT), "--run-dir", str(tmp_path / "run"), **own)
    assert cluster.finished(job) == ("FAILED", 3), cluster.output(job)
    assert (tmp_path / "written").exists() and cluster.shown(job)["Restarts"] == "0"


def test_scancel_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    """The task answers 75, and the job does not come back: not as with the signal before the time
    limit, which here ends a task that had not begun to train."""
    does = (
        f"[ -e {tmp_path}/again ] && trap 'exit 75' TERM; touch {tmp_path}/again {tmp_path}/up;"
        " while :; do sleep 0.1; done"
    )
    own = {"PYTHON": fake(tmp_path, does)}
    words = ("--nodes=1", str(SCRIPT), "--run-dir", str(tmp_path / "run"))
    job = cluster.submit(*words, **own)
    cluster.wait((tmp_path / "up").exists, "the task")
    (tmp_path / "up").unlink()
    cluster.say("scancel", "--signal=USR1", "--batch", job)  # to the script alone
    cluster.wait((tmp_path / "up").exists, "the second start")
    cluster.say("scancel", job)
    assert cluster.finished(job)[0] == "CANCELLED"
    cluster.wait(lambda: gone(cluster), "its end")
    assert cluster.shown(job)["Restarts"] == "1"
    assert cluster.output(job).count("the job is requeued") == 1
    assert "ended with 75 (asked to end" in cluster.output(job)
