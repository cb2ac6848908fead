"""How far off `python -m jaxmoe.plan` is: memory against the compiled step, time against a clock.

    python benchmarks/plan.py             # memory: fourteen configs on emulated CPU devices
    python benchmarks/plan.py --time      # step time of single-device shapes on this machine

The rules of plan/liveness.py were made while looking at the first ten; the last four came after.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, MlaConfig, ModelConfig, TrainConfig, apply_sets, replace
from jaxmoe.config_check import check
from jaxmoe.model.cost import cost
from jaxmoe.plan.aot import lower
from jaxmoe.plan.forecast import step_time
from jaxmoe.plan.hardware import find
from jaxmoe.plan.memory import forecast
from jaxmoe.run.state import init_state
from jaxmoe.run.step import Batch, train_step

MOE = ModelConfig(
    vocab_size=4096, d_model=256, n_layers=6, n_heads=8, n_kv_heads=4, d_head=32, d_ff=256
)
DENSE = replace(MOE, n_experts=1, top_k=1, d_ff=512)
LATENT = replace(
    MOE,
    n_kv_heads=8,
    qk_norm="none",
    mla=MlaConfig(q_rank=96, kv_rank=64, d_nope=32, d_rope=16, d_value=32),
    n_shared_experts=1,
    first_dense=1,
    d_ff_dense=512,
)

# Model, devices, changes. The first ten, and those that came after.
CASES: tuple[tuple[ModelConfig, int, str], ...] = (
    (MOE, 1, ""),
    (DENSE, 1, ""),
    (MOE, 8, "mesh.data=8"),
    (MOE, 8, "mesh.expert=4 mesh.data=2"),
    (MOE, 8, "mesh.model=4 mesh.data=2"),
    (MOE, 8, "mesh.replica=2 mesh.expert=2 mesh.model=2"),
    (MOE, 1, "model.remat=none"),
    (MOE, 4, "mesh.expert=4 train.seq_len=1024 train.batch_size=8"),
    (DENSE, 8, "mesh.data=4 mesh.model=2 model.d_model=512"),
    (MOE, 1, "model.vocab_size=2048 model.d_model=128 model.n_layers=4 train.batch_size=8"),
    (LATENT, 4, "mesh.data=2 mesh.model=2"),
    (MOE, 4, "mesh.expert=2 mesh.data=2 model.remat=none model.n_experts=16 model.top_k=4"),
    (DENSE, 2, "mesh.replica=2 model.n_layers=12 optim.name=muon"),
    (
        MOE,
        8,
        "mesh.data=4 mesh.expert=2 model.sliding_window=96 model.global_every=3 model.n_mtp=1",
    ),
)
# Rows of benchmarks/step.py.
TIMED = {
    "dense": "model.n_experts=1 model.top_k=1 model.d_ff=1024",
    "moe8": "",
    "moe64": "model.n_experts=64 model.top_k=8 model.d_ff=128",
}


def config_of(model: ModelConfig, sets: str) -> Config:
    config = Config(name="case", model=model, train=TrainConfig(batch_size=16, seq_len=256))
    return apply_sets(config, sets.split())


def compiled(config: Config, n_devices: int) -> Any:
    return lower(config, mesh_lib.over(config.mesh, jax.devices()[:n_devices])).compile()


def used(program: Any) -> int:
    """Bytes of a device that a compiled program needs."""
    m = program.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return total - m.alias_size_in_bytes


def memory() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    print("| devices | config | compiled | forecast | off | compile | forecast takes |")
    print("|---|---|---|---|---|---|---|")
    names = {MOE: "8 experts", DENSE: "dense", LATENT: "latent attention, shared expert"}
    for model, n_devices, sets in CASES:
        config = config_of(model, sets)
        check(config)
        begin = time.perf_counter()
        guess = forecast(config, n_devices, "cpu").peak
        between = time.perf_counter()
        real = used(compiled(config, n_devices))
        end = time.perf_counter()
        print(
            f"| {n_devices} | {names[model]} {sets} | {real / 1e6:.1f} MB | {guess / 1e6:.1f} MB |"
            f" {guess / real - 1:+.1%} | {end - between:.1f} s | {between - begin:.1f} s |",
            flush=True,
        )


def step_times(steps: int) -> None:
    print("| row | measured | forecast | off | compute | memory | update |")
    print("|---|---|---|---|---|---|---|")
    base = replace(MOE, vocab_size=8192, n_layers=4, n_heads=4, d_head=64, d_ff=512, qk_norm="none")
    for name, sets in TIMED.items():
        config = config_of(replace(base, n_kv_heads=4), f"train.batch_size=8 {sets}")
        chip = find("cpu")
        found, _ = step_time(config, 1, chip, forecast(config, 1, "cpu"), chip.efficiency)
        real = measured(config, steps)
        flops = cost(config.model, 256).flops_per_sequence * config.train.batch_size
        print(
            f"| {name} | {real:.3f} s, MFU {flops / real / chip.bf16:.0%} | {found.seconds:.3f} s |"
            f" {found.seconds / real - 1:+.0%} | {found.compute:.3f} | {found.memory:.3f} |"
            f" {found.update:.3f} |",
            flush=True,
        )


def measured(config: Config, steps: int) -> float:
    """Median seconds of a step on random tokens, which load experts evenly."""
    mesh = mesh_lib.build(config.mesh)
    shape = (config.train.batch_size, config.train.seq_len)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        rows = mesh_lib.batch_sharding(mesh, 2)
        key = jax.random.key(0)
        tokens = jax.random.randint(key, (shape[0], shape[1] + 1), 0, config.model.vocab_size)
        batch = Batch(
            jax.device_put(tokens, rows), jax.device_put(jnp.ones(shape, jnp.float32), rows)
        )
        seconds = []
        for _ in range(steps + 2):
            begin = time.perf_counter()
            state, metrics = train_step(state, batch, config)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--time", action="store_true", help="step time instead of memory")
    parser.add_argument("--steps", type=int, default=8, help="of --time, after two")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    if args.time:
        step_times(args.steps)
    else:
        memory()


if __name__ == "__main__":
    main()
