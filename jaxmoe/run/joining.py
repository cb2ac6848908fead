"""Which processes a run is made of, and who says so: explicit variables, else JAX's own detection.

A scheduler leaves its variables wherever it runs anything, also where one process is alone: in a
batch script, an interactive shell, a pod of a notebook. So JAX is asked to detect a cluster only
where this process is known to be one of several, or where JAX alone can know (TPU, Kubernetes).
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from jaxmoe import jax_versions
from jaxmoe.errors import UserError

__all__ = ["Processes", "find", "join"]

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAXMOE_NUM_PROCESSES", "JAXMOE_PROCESS_ID"
DEVICES = "JAX_LOCAL_DEVICE_IDS"  # JAX's own: of GPUs, those that this process uses


@dataclass(frozen=True, kw_only=True)
class Processes:
    """As `jax.distributed.initialize` takes them; what is None JAX detects.

    Attributes:
        where: they were found, for messages.
        method: of detection; "deactivate" where nothing is left to detect.
        devices: GPUs of this process; [] all that it sees, None what JAX takes by itself, which is
            one where several processes share a node.
    """

    where: str
    address: str | None = None
    count: int | None = None
    number: int | None = None
    method: str | None = None
    devices: list[int] | None = None


def find(env: Mapping[str, str] = os.environ) -> Processes | None:
    """Those to join; None where this process is alone.

    `JAX_COORDINATOR_ADDRESS`, `JAXMOE_NUM_PROCESSES` and `JAXMOE_PROCESS_ID` win; what they leave
    open is detected. `JAXMOE_NUM_PROCESSES=1` is a process alone, wherever it is.

    Raises:
        UserError: a variable is no number, one is missing and nothing says it, or a launcher
            started several processes that JAX cannot tell apart.
    """
    address, count, number = env.get(ADDRESS) or None, _number(env, COUNT), _number(env, NUMBER)
    if count == 1:
        return None
    if address and count is not None and number is not None:
        if number >= count:
            raise UserError(f"{NUMBER}={number}: they are counted from 0, and {COUNT}={count}")
        # Else JAX would still take one GPU of a Slurm task, though it may be alone on its node.
        return Processes(
            where=address, address=address, count=count, number=number, method="deactivate"
        )
    found = _detected(env)
    if found is not None:
        return Processes(
            where=found.where,
            address=address,
            count=found.count if count is None else count,
            number=number,
            method=found.method,
            devices=found.devices if not env.get(DEVICES) else None,
        )
    given = [name for name in (ADDRESS, COUNT, NUMBER) if env.get(name)]
    if given:
        missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
        raise UserError(
            f"{given[0]}={env[given[0]]} is set and {', '.join(missing)} not, nor is there a"
            f" cluster that says it; set all three, or {COUNT}=1 for one process alone"
        )
    return None


def join(processes: Processes, peer_deadline: int) -> int:
    """Joins the others; how many processes there are.

    Args:
        peer_deadline: seconds without a sign of life after which a process is taken for dead.

    Raises:
        UserError: they cannot be joined, or detection found less than it needs.
    """
    try:
        jax.distributed.initialize(
            processes.address,
            num_processes=processes.count,
            process_id=processes.number,
            local_device_ids=processes.devices,
            cluster_detection_method=processes.method,
            heartbeat_timeout_seconds=peer_deadline,
        )
    # Detection asks servers of metadata (OSError), and reads what others have written.
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"cannot join the processes ({processes.where}): {said}; set {ADDRESS}, {COUNT} and"
            f" {NUMBER}, or {COUNT}=1 for one process alone"
        ) from error
    return jax_versions.joined_processes()


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name)
    if not text:
        return None
    least = 1 if name == COUNT else 0
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text}: it must be a number from {least} on")
    return int(text)


def _detected(env: Mapping[str, str]) -> Processes | None:
    """In JAX's order. Counts are those of this step or program, not of the whole allocation."""
    for look in (_open_mpi, _slurm, _tpu, _kubernetes):
        if (found := look(env)) is not None:
            return found
    return None


def _open_mpi(env: Mapping[str, str]) -> Processes | None:
    count = int(env.get("OMPI_COMM_WORLD_SIZE", 1))
    if count == 1:
        return None
    where = f"Open MPI, {count} processes"
    alone = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    # Open MPI 5 says no address; with mpi4py the processes tell each other.
    old = "OMPI_MCA_orte_hnp_uri" in env
    if not old and importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            f"{where} (OMPI_COMM_WORLD_SIZE) of version 5 or later: install mpi4py, or set"
            f" {ADDRESS}, {COUNT} and {NUMBER}"
        )
    return Processes(where=where, method=None if old else "mpi4py", devices=[] if alone else None)


def _slurm(env: Mapping[str, str]) -> Processes | None:
    """A step that `srun` started with several tasks. Shells and batch scripts of an allocation have
    SLURM_NTASKS too, which is why that is not asked."""
    count = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1 or "SLURM_PROCID" not in env:
        return None
    # "1(x2)" or "2,1": tasks of each node of the step.
    alone = all(part.partition("(")[0] == "1" for part in _per_node(env))
    where = f"Slurm, {count} tasks"
    # JAX gives a task the GPU of its number on the node: the first one to a task that has the node
    # for itself. An empty list is all of them.
    return Processes(where=where, count=count, devices=[] if alone else None)


def _per_node(env: Mapping[str, str]) -> list[str]:
    return env.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")


def _tpu(env: Mapping[str, str]) -> Processes | None:
    """JAX asks the machine's metadata for the other hosts of the pod."""
    if not jax_versions.in_tpu_vm() or env.get("JAX_PLATFORMS", "tpu").startswith("cpu"):
        return None
    return Processes(where="TPU")


def _kubernetes(env: Mapping[str, str]) -> Processes | None:
    """A pod of an indexed Job, of which JAX asks the cluster; other pods are alone."""
    if "KUBERNETES_SERVICE_HOST" not in env or "JOB_COMPLETION_INDEX" not in env:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "a pod of an indexed Kubernetes Job: install the package kubernetes, by which JAX finds"
            f" the others, or set {ADDRESS}, {COUNT} and {NUMBER} ({COUNT}=1: this one alone)"
        )
    return Processes(where="Kubernetes")
