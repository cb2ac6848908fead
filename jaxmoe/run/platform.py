"""Starts JAX for a run: emulated CPU devices, processes, and this machine's own speed."""

import os
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxmoe
from jaxmoe import mesh
from jaxmoe.config import Config
from jaxmoe.run import joining


def start(config: Config) -> None:
    """Must run before anything touches a device.

    Joins the other processes where there are any (run/joining.py says who says so); on CPU they
    talk through gloo.

    Raises:
        UserError: they cannot be joined.
    """
    processes, count = joining.find(), 1
    if processes is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # It would swallow SIGTERM from here on; run/preemption.py listens while there is a run.
        jax.config.update("jax_enable_preemption_service", False)
        count = joining.join(processes, config.health.peer_deadline)
    jax.config.update("jax_num_cpu_devices", mesh.devices_wanted(config.mesh, count))


def describe_devices() -> str:
    """Such as `8 x cpu, 2 processes`."""
    text = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return text + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")


def measured_peak(dtype: str) -> float:
    """FLOP/s of the best large matmul seen, over all devices; the yardstick of MFU.

    Emulated CPU devices share this machine's cores, so there it is one device's figure.
    """
    on_cpu = jax.default_backend() == "cpu"
    n, seconds = (1024, 0.3) if on_cpu else (8192, 1.0)
    square = jax.device_put(np.ones((n, n), np.float32), jax.local_devices()[0]).astype(dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a))
    product(square).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        product(square).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best * (1 if on_cpu else jax.device_count())


def code_version() -> str:
    """The package's version and, in a checkout, its commit; "-dirty" where files were changed."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    # An installed package may lie below somebody else's checkout, whose commit says nothing.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, env=env)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a slow file system
        return jaxmoe.__version__
    commit = found.stdout.strip()
    return f"{jaxmoe.__version__}+{commit}" if found.returncode == 0 else jaxmoe.__version__
