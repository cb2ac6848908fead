"""Which processes a run is made of: explicit variables win, JAX's own detection fills the rest."""

import importlib.util
from typing import Any

import jax
import pytest

from jaxmoe import jax_versions
from jaxmoe.errors import UserError
from jaxmoe.run import joining
from jaxmoe.run.joining import Processes, find

TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
ALL = {
    "JAX_COORDINATOR_ADDRESS": "n9:1",
    "JAXMOE_NUM_PROCESSES": "3",
    "JAXMOE_PROCESS_ID": "2",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    "env",
    [
        {},
        # A batch script, and a shell that salloc opened as a step: both know the job's tasks.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
        POD,  # of a notebook, or of any Job that is not indexed
        {**TASK, "JAXMOE_NUM_PROCESSES": "1"},
        {**POD, "JOB_COMPLETION_INDEX": "0", "JAXMOE_NUM_PROCESSES": "1"},
    ],
    ids=["nothing", "batch", "shell", "mpirun-1", "pod", "said-in-slurm", "said-in-pod"],
)
def test_a_process_alone_joins_nobody(env: dict[str, str]) -> None:
    assert find(env) is None


def test_three_variables_win_over_any_cluster() -> None:
    """And no GPU is taken away by a detection that they make needless."""
    expected = Processes(where="n9:1", address="n9:1", count=3, number=2, method="deactivate")
    for cluster in ({}, TASK, {**OMPI, **TASK}, {**POD, "JOB_COMPLETION_INDEX": "1"}):
        assert find({**cluster, **ALL}) == expected


def test_a_variable_wins_where_the_rest_is_detected() -> None:
    found = find({**TASK, "JAX_COORDINATOR_ADDRESS": "n9:1"})
    assert found is not None
    assert (found.address, found.count, found.number, found.method) == ("n9:1", 4, None, None)
    found = find({**TASK, "JAXMOE_NUM_PROCESSES": "2"})
    assert found is not None and found.count == 2


@pytest.mark.parametrize(
    ("env", "devices"),
    [
        (TASK, []),  # a task a node: all its GPUs, where JAX would take the first
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, None),
        ({**TASK, "SLURM_STEP_TASKS_PER_NODE": "1,3"}, None),
        ({**TASK, "JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # JAX reads it where nothing is passed
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": "x"}, None),
        ({**OMPI, "OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
    ],
)
def test_a_process_that_has_its_node_alone_uses_all_its_gpus(
    env: dict[str, str], devices: list[int] | None
) -> None:
    found = find(env)
    assert found is not None and found.devices == devices


def test_what_jax_alone_can_know_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert find({**POD, "JOB_COMPLETION_INDEX": "3"}) == Processes(where="Kubernetes")
    found = find(OMPI)
    assert found is not None and found.method == "mpi4py"  # version 5
    monkeypatch.setattr(jax_versions, "in_tpu_vm", lambda: True)
    assert find({}) == Processes(where="TPU")
    assert find({**POD, "JOB_COMPLETION_INDEX": "3"}) == Processes(where="TPU")  # GKE
    assert find({"JAX_PLATFORMS": "cpu"}) is None


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({**ALL, "JAXMOE_PROCESS_ID": "3"}, "JAXMOE_PROCESS_ID=3: they are counted from 0"),
        ({**ALL, "JAXMOE_NUM_PROCESSES": "two"}, "JAXMOE_NUM_PROCESSES=two: it must be a number"),
        (
            {**ALL, "JAXMOE_NUM_PROCESSES": "0"},
            "JAXMOE_NUM_PROCESSES=0: it must be a",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "n9:1"}, "JAXMOE_NUM_PROCESSES, JAXMOE_PROCESS_ID not"),
        ({**ALL, "JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS not"),
        (OMPI, "install mpi4py"),
        ({**POD, "JOB_COMPLETION_INDEX": "0"}, "install the package kubernetes"),
    ],
)
def test_what_is_half_said_is_a_mistake_in_one_line(
    env: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else several processes would each train alone, into one run directory."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said) as told:
        find(env)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError])
def test_a_detection_that_fails_is_a_mistake_in_one_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error("no\n  metadata server")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    with pytest.raises(UserError, match=r"\(TPU\): no metadata server; set JAX_COORD.*=1 for one"):
        joining.join(Processes(where="TPU"), 10)
