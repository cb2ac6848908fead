"""launch/k8s: every document against published schemas, what each exit code leads to, and who a
process is told it is.

Kubernetes and the JobSet controller are stood for by their documented rules: the first rule of
podFailurePolicy that matches decides, its number is in the Job's message, and the first rule of
failurePolicy that matches reason and message decides what becomes of the JobSet.
"""

import copy
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jsonschema
import kubernetes_validate
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster
from processes import ROOT

from jaxmoe import config as config_lib
from jaxmoe import exits, supervise, train
from jaxmoe.config import Config, replace
from jaxmoe.data import __main__ as data_command
from jaxmoe.run import platform

K8S = ROOT / "launch" / "k8s"
# The oldest that is promised, and the newest that the package knows.
VERSIONS = ("1.31", "1.37")
JOBSETS = ("gpu", "tpu")
CORE = ("storage", "data")
SCHEMA = jsonschema.Draft202012Validator(
    yaml.safe_load((Path(__file__).parent / "jobset_v1alpha2.json").read_text()),
    format_checker=jsonschema.FormatChecker(["regex"]),
)

Tree = dict[str, Any]


def document(name: str) -> Tree:
    [one] = yaml.safe_load_all((K8S / f"{name}.yaml").read_text())
    return one


def the_job(jobset: Tree) -> Tree:
    """What the controller makes of the only replicated job's template."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    spec = replicated["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def pod(job: Tree) -> Tree:
    return job["spec"]["template"]["spec"]


def container(job: Tree) -> Tree:
    [one] = pod(job)["containers"]
    return one


def check(one: Tree) -> None:
    """Raises jsonschema.ValidationError, of which the package's own is one."""
    if one["kind"] == "JobSet":
        SCHEMA.validate(one)
        one = the_job(one)
    for version in VERSIONS:
        assert kubernetes_validate.validate(one, version, strict=True) == version


@pytest.mark.parametrize("name", JOBSETS + CORE)
def test_the_document_is_what_the_schemas_say(name: str) -> None:
    check(document(name))


def test_all_documents_are_checked() -> None:
    assert sorted(f.stem for f in K8S.glob("*.yaml")) == sorted(JOBSETS + CORE)


def misspellings(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every key."""
    if isinstance(tree, dict):
        below = [misspellings(v, (*path, k)) for k, v in tree.items()]
        return [(*path, k) for k in tree] + sum(below, [])
    if isinstance(tree, list):
        return sum((misspellings(v, (*path, i)) for i, v in enumerate(tree)), [])
    return []


# Below these any key is right: Kubernetes has no list of them.
FREE = {"annotations", "labels", "nodeSelector", "requests", "limits"}


@pytest.mark.parametrize("name", JOBSETS + CORE)
def test_any_misspelt_field_is_found(name: str) -> None:
    whole = document(name)
    ways = [way for way in misspellings(whole) if not FREE & set(way[:-1])]
    assert len(ways) > 8
    for way in ways:
        bad = copy.deepcopy(whole)
        place = bad
        for key in way[:-1]:
            place = place[key]
        place[f"{way[-1]}X"] = place.pop(way[-1])
        with pytest.raises((jsonschema.ValidationError, KeyError)):
            check(bad)


# What becomes of a run, and whether it counts.
FAILED, FREELY, COUNTED = "failed", "again", "again, counted"
OUTCOMES = {
    "FailJobSet": FAILED,
    "RestartJobSet": COUNTED,
    "RestartJobSetAndIgnoreMaxRestarts": FREELY,
}


def outcome(jobset: Tree, code: int, conditions: tuple[str, ...] = ()) -> str:
    """What follows the end of one pod, by an exit code other than 0 and with conditions."""
    spec = the_job(jobset)["spec"]
    assert spec["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        asks = rule.get("onExitCodes")
        if asks is not None:
            assert asks["containerName"] == container(the_job(jobset))["name"]
            hit = (code in asks["values"]) == (asks["operator"] == "In")
            what = f"Container trainer for pod ns/p failed with exit code {code}"
        else:
            hit = any(one["type"] in conditions for one in rule["onPodConditions"])
            what = f"Pod ns/p has condition {conditions and conditions[0]}"
        if hit:
            assert rule["action"] == "FailJob"
            reason, message = "PodFailurePolicy", f"{what} matching FailJob rule at index {index}"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]):
            if any(re.search(pattern, message) for pattern in patterns):
                return OUTCOMES[rule["action"]]
    return OUTCOMES["RestartJobSet"]


def meant(code: int) -> str:
    """By docs/reliability.md: "the same command goes on" is a fault unless it was asked to end."""
    table = (ROOT / "docs" / "reliability.md").read_text().split("## Asked to end")[0]
    words = dict(re.findall(r"^\| (\d+)[^|]*\| [^|]* \| ([^|]*)\|$", table, re.M))[str(code)]
    if "run it again" in words:
        return FREELY
    return COUNTED if re.search(r"the same command( goes on|;)", words) else FAILED


@pytest.mark.parametrize("name", JOBSETS)
def test_every_exit_code_leads_to_what_it_means(name: str) -> None:
    """As the supervisor takes it: final, asked to end, or a fault that is run again."""
    jobset = document(name)
    codes = {getattr(exits, one) for one in exits.__all__ if one != "REQUESTS"} - {exits.DONE}
    assert len(codes) == 8
    # The same command would go on after these too, but someone looks first.
    for code in codes - {exits.ALARM, exits.INTERRUPTED}:
        assert outcome(jobset, code) == meant(code), code
    for code in range(1, 256):
        by_request = code == exits.REQUEUE or code in supervise.BY_REQUEST
        final = code in supervise.FINAL or code == exits.NO_PROGRESS
        expected = FREELY if by_request else FAILED if final else COUNTED
        assert outcome(jobset, code) == expected, code


@pytest.mark.parametrize("name", JOBSETS)
def test_evictions_do_not_count_and_do_not_hide_a_mistake(name: str) -> None:
    jobset = document(name)
    for code in (exits.FAULT, exits.HUNG, 137, exits.REQUEUE):
        assert outcome(jobset, code, ("Ready", "DisruptionTarget")) == FREELY
    assert outcome(jobset, exits.MISTAKE, ("DisruptionTarget",)) == FAILED
    assert outcome(jobset, 137, ("Ready",)) == COUNTED  # out of memory, kill -9
    policy = jobset["spec"]["failurePolicy"]
    assert 0 < policy["maxRestarts"] <= 100  # a cap
    assert policy["restartStrategy"] == "BlockingRecreate"


def ending_time(name: str) -> tuple[float, Tree]:
    spec = pod(the_job(document(name)))
    return spec["terminationGracePeriodSeconds"], spec


@pytest.mark.parametrize("name", JOBSETS)
def test_a_pod_that_is_asked_to_end_hears_it_and_has_the_time(name: str) -> None:
    """Process 1 of a container ignores a SIGTERM that it does not handle; a save is let finish."""
    grace, spec = ending_time(name)
    assert grace >= 600
    assert spec["shareProcessNamespace"] is True
    assert spec["restartPolicy"] == "Never"
    assert container(the_job(document(name)))["command"][0] == "python"  # no shell between


def environment(jobset: Tree, slice_index: int, pod_index: int) -> dict[str, str]:
    """Of a container, as Kubernetes makes it: in order, $(NAME) from what came before."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "jobset.sigs.k8s.io/job-index": str(slice_index),
        "batch.kubernetes.io/job-completion-index": str(pod_index),
    }
    env: dict[str, str] = {}
    for one in container(the_job(jobset))["env"]:
        if "value" in one:
            value = expanded(one["value"], env)
        else:
            path = one["valueFrom"]["fieldRef"]["fieldPath"]
            [label] = re.findall(r"^metadata\.labels\['(.+)'\]$", path)
            value = labels[label]
        env[one["name"]] = value
    return env


def expanded(text: str, env: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda m: env.get(m[1], m[0]), text)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], tuple[Any, ...]]:
    """Address, count and id that JAX is told by jaxmoe.run.platform in an environment."""

    def join(env: dict[str, str]) -> tuple[Any, ...]:
        told: list[tuple[Any, ...]] = []

        def initialize(coordinator_address: Any = None, **options: Any) -> None:
            names = "num_processes", "process_id"
            told.append((coordinator_address, *map(options.get, names)))

        with monkeypatch.context() as m:
            m.setattr(jax.distributed, "initialize", initialize)
            m.setattr(jax.config, "update", lambda *_: None)
            for key, value in env.items():
                m.setenv(key, value)
            platform.start(Config())
        [one] = told
        return one

    return join


def test_every_gpu_pod_is_told_the_address_the_count_and_its_number(
    joined: Callable[[dict[str, str]], tuple[Any, ...]],
) -> None:
    jobset = document("gpu")
    jobset["metadata"]["name"] = "mine"
    spec = the_job(jobset)["spec"]
    count = spec["completions"]
    assert (spec["parallelism"], spec["completionMode"]) == (count, "Indexed")
    port = container(the_job(jobset))["ports"][0]["containerPort"]
    # <jobset>-<replicated job>-<job>-<pod>.<subdomain>, the subdomain being the JobSet's name
    assert jobset["spec"]["network"] == {
        "enableDNSHostnames": True,
        "publishNotReadyAddresses": True,
    }
    for index in range(count):
        told = joined(environment(jobset, 0, index))
        assert told == (f"mine-workers-0-0.mine:{port}", count, index)


def chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def test_tpu_hosts_and_chips_are_those_of_the_topology() -> None:
    job = the_job(document("tpu"))
    topology = pod(job)["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == hosts
    assert hosts * container(job)["resources"]["limits"]["google.com/tpu"] == chips(topology)


def test_tpu_processes_are_numbered_by_jax_over_hosts_and_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what GKE adds to the pods; the document itself sets nothing that would override it."""
    jobset = document("tpu")
    cluster = cloud_tpu_cluster.GkeTpuCluster
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cluster, "wait_for_coordinator", lambda *_: None)
    name, hosts = jobset["metadata"]["name"], the_job(jobset)["spec"]["completions"]
    seen = []
    for slice_index in range(2):
        for host in range(hosts):
            own = environment(jobset, slice_index, host)
            assert not {key for key in own if key.startswith(("JAX_", "JAXMOE_N", "JAXMOE_P"))}
            job = f"{name}-slice-{slice_index}"
            own |= {
                "TPU_WORKER_ID": str(host),
                "TPU_WORKER_HOSTNAMES": ",".join(f"{job}-{h}.{name}" for h in range(hosts)),
                "MEGASCALE_COORDINATOR_ADDRESS": f"{name}-slice-0-0.{name}",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": str(slice_index),
            }
            for key, value in own.items():
                monkeypatch.setenv(key, value)
            assert cluster.is_env_present()
            address, count, number, _ = cluster.auto_detect_unset_distributed_params(
                None, None, None, None, "gketpu", 1
            )
            assert (address, count) == (f"{name}-slice-0-0.{name}:8482", 2 * hosts)
            seen.append(number)
    assert seen == list(range(2 * hosts))


def accelerators(job: Tree) -> int:
    limits = container(job)["resources"]["limits"]
    return limits.get("nvidia.com/gpu") or limits["google.com/tpu"]


@pytest.mark.parametrize("name", JOBSETS)
def test_the_command_is_one_that_train_takes_on_those_devices(name: str) -> None:
    jobset = document(name)
    job = the_job(jobset)
    env = environment(jobset, 0, 0)
    args = [expanded(word, env) for word in container(job)["args"]]
    assert container(job)["command"] == ["python", "-m", "jaxmoe.train"]
    parsed = train._parser().parse_args(args)
    assert parsed.run_dir == f"/runs/{jobset['metadata']['name']}"
    loaded = config_lib.apply_sets(config_lib.load(str(ROOT / parsed.config)), parsed.set)
    devices = job["spec"]["completions"] * accelerators(job)
    assert loaded.mesh == replace(loaded.mesh, data=-1)  # takes all there are
    assert loaded.train.batch_size % devices == 0
    assert loaded.eval.batch_size % devices == 0


def test_the_data_sets_command_is_one_that_data_takes() -> None:
    one = container(document("data"))
    assert one["command"] == ["python", "-m", "jaxmoe.data", "build"]
    parsed = data_command._parser().parse_args(["build", *one["args"]])
    assert (parsed.source, str(parsed.out)) == (["mine=/runs/text"], "/runs/data/mine")


@pytest.mark.parametrize("name", [*JOBSETS, "data"])
def test_all_write_below_the_shared_claim(name: str) -> None:
    one = document(name)
    job = the_job(one) if one["kind"] == "JobSet" else one
    claim = {"claimName": document("storage")["metadata"]["name"]}
    [volume] = [v for v in pod(job)["volumes"] if v.get("persistentVolumeClaim") == claim]
    mounts = {m["name"]: m["mountPath"] for m in container(job)["volumeMounts"]}
    assert mounts.pop(volume["name"]) == "/runs"
    assert document("storage")["spec"]["accessModes"] == ["ReadWriteMany"]
    if name == "gpu":
        [shm] = mounts
        assert mounts[shm] == "/dev/shm"
        [memory] = [v["emptyDir"]["medium"] for v in pod(job)["volumes"] if v["name"] == shm]
        assert memory == "Memory"


def test_the_image_has_what_the_commands_need() -> None:
    """Everything it copies is there and let in, and the versions are those of the lock."""
    lines = (K8S / "Dockerfile").read_text().splitlines()
    let_in = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
    assert let_in[0] == "*"
    copied = [word for row in lines if row.startswith("COPY") for word in row.split()[1:-1]]
    assert {"configs", "jaxmoe", "requirements.lock", "pyproject.toml"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in let_in
    installs = [shlex.split(row[4:]) for row in lines if row.startswith("RUN pip install")]
    assert len(installs) == 2
    for words in installs:
        assert words[words.index("--constraint") + 1] == "requirements.lock"
    assert "WORKDIR /opt/jaxmoe" in lines  # --config=configs/... of the commands
