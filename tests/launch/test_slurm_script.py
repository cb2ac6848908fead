"""What launch/slurm.sh asks of Slurm, by programs that only repeat it: no GPU can be had here."""

import os
import subprocess
from pathlib import Path

from processes import PATIENCE, ROOT

SCRIPT = ROOT / "launch" / "slurm.sh"


def test_a_task_a_gpu_is_asked_for_by_gpus_of_the_node(tmp_path: Path) -> None:
    """Not by task, which would hide the GPUs of a node from each other."""
    answers = {
        "scontrol": 'case "$2" in hostnames) echo n1;; node) echo " NodeAddr=10.0.0.1 ";; esac',
        "srun": f'echo "$* | $JAXMOE_NUM_PROCESSES $JAX_COORDINATOR_ADDRESS" >> {tmp_path}/said',
    }
    for name, does in answers.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    job |= {"SLURM_GPUS_PER_NODE": "h100:4", "SLURM_JOB_CPUS_PER_NODE": "96(x1),64"}
    job |= {"SLURM_NTASKS": "9", "JAXMOE_SRUN": "--label --mpi=none", "JAX_COORDINATOR_PORT": "77"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAXMOE_ROOT": str(ROOT), **job}
    words = [str(SCRIPT), "--tasks", "gpu", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    (step,) = [line for line in (tmp_path / "said").read_text().splitlines() if "ntasks=8" in line]
    options = step.partition(" bash ")[0].split()
    assert options == [
        "--kill-on-bad-exit=1",
        "--cpus-per-task=16",
        "--gpus-per-node=4",
        "--label",
        "--mpi=none",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
    ]
    assert "8 10.0.0.1:77" in (tmp_path / "said").read_text()
    refused = subprocess.run(
        words, env={**env, "SLURM_GPUS_PER_TASK": "1"}, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "ask for --gpus-per-node=N" in refused.stderr
