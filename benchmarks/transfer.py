"""Does the best learning rate stay as a model grows? A sweep over rates, widths and depths.

    python benchmarks/transfer.py run --out benchmarks/records/transfer.jsonl
    python benchmarks/transfer.py show benchmarks/records/transfer.jsonl

Every run is a rung-like model (configs/ladder.py) at the same tokens, batch and seed, with the
rules of jaxmoe/transfer.py or (--rules none) without; its last training losses are averaged. Rates
are powers of two around one. A line is written when a run ends, and what the file has is not run
again.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe import transfer
from jaxmoe.config import Config, MeshConfig, replace
from jaxmoe.data.cache import prepare
from jaxmoe.data.loader import Stream
from jaxmoe.forecast.rate_law import fit_optima, fit_power_law
from jaxmoe.model.cost import cost
from jaxmoe.optim import optimizer
from jaxmoe.run import platform
from jaxmoe.run.state import TrainState, init_state, param_specs
from jaxmoe.run.step import Batch, gradients

ROOT = Path(__file__).resolve().parents[1]
LADDER = config_lib.import_file(ROOT / "configs" / "ladder.py")
LAST = 0.2  # of the losses are averaged: where the rate falls
WIDTHS, DEPTHS = (16, 32, 64, 128), (2, 4, 8)
DEPTH_WIDTH = 32


def sized(args: argparse.Namespace, width: int, depth: int, lr: float, seed: int) -> Config:
    """The base rung's run, of another width and depth."""
    config = LADDER.rung(LADDER.BASE, experts=args.experts, optim=args.optim, seed=seed)
    m = config.model
    model = replace(
        m,
        d_model=width,
        n_layers=depth,
        n_heads=width // m.d_head,
        n_kv_heads=width // m.d_head,
        d_ff=m.d_ff * width // m.d_model,
        transfer=m.transfer if args.rules == "all" else None,
    )
    steps = args.steps
    optim = replace(
        config.optim,
        lr=lr,
        warmup_steps=steps // 20,
        weight_decay=transfer.weight_decay(lr, steps, LADDER.TIMESCALE),
    )
    data = replace(config.data, max_bytes=args.bytes)
    train = replace(config.train, steps=steps, batch_size=args.batch)
    return replace(
        config, model=model, optim=optim, data=data, train=train, mesh=MeshConfig(data=1)
    )


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Small ones first, and rates from the middle outwards."""
    sizes = [(width, 2) for width in WIDTHS if width <= args.widest]
    sizes += [(DEPTH_WIDTH, depth) for depth in DEPTHS if depth <= args.deepest]
    middle = LADDER.RATES[args.optim]
    octaves = sorted(range(-args.octaves, args.octaves + 1), key=abs)
    for seed in range(args.seeds):
        for width, depth in sizes:
            for octave in octaves:
                lr = middle * 2.0**octave
                yield {"width": width, "depth": depth, "lr": lr, "seed": seed}


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def step(state: TrainState, batch: Batch, rates: Any, config: Config) -> tuple[TrainState, Any]:
    """run.step.train_step with (lr, weight decay) as numbers of the run, so that one program does
    for all rates of a size."""
    optim = replace(config.optim, lr=rates[0], weight_decay=rates[1])
    tx = optimizer(optim, param_specs(config), config.train.steps)
    grads, (sums, _) = gradients(state.params, batch, config)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    return new, sums.nll / sums.weight


def run(config: Config) -> dict[str, Any]:
    """Trains it; the mean of the last losses, nats per token."""
    corpus = prepare(config.data, config.model.vocab_size, lambda *_: None)
    stream = Stream(corpus.train, config.train.seq_len, config.seed)
    mesh = mesh_lib.build(config.mesh)
    rates = np.asarray([config.optim.lr, config.optim.weight_decay], np.float32)
    same = replace(config, optim=replace(config.optim, lr=1.0, weight_decay=0.0))
    began, losses = time.perf_counter(), []
    with jax.set_mesh(mesh):
        sharding = mesh_lib.batch_sharding(mesh, 2)
        state = init_state(same, mesh)
        for number in range(config.train.steps):
            size = config.train.batch_size
            tokens = stream.rows(number * size, 0, size)
            weights = np.ones((size, config.train.seq_len), np.float32)
            batch = Batch(*(jax.device_put(a, sharding) for a in (tokens, weights)))
            state, loss = step(state, batch, rates, same)
            losses.append(loss)
    tail = [float(x) for x in losses[-max(1, round(LAST * len(losses))) :]]
    return {
        "loss": float(np.mean(tail)),
        "params_active": cost(config.model, config.train.seq_len).params_active,
        "tokens": config.train.steps * config.tokens_per_step,
        "seconds": round(time.perf_counter() - began, 1),
        "data": corpus.fingerprint,
    }


def sweep(args: argparse.Namespace) -> None:
    platform.start(sized(args, 16, 2, 1e-3, 0))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    common = {key: getattr(args, key) for key in ("rules", "optim", "experts", "steps", "batch")}
    done = {_key(line) for line in _lines(args.out)}
    for case in cases(args):
        line = common | case
        if _key(line) in done:
            continue
        config = sized(args, case["width"], case["depth"], case["lr"], case["seed"])
        line |= run(config)
        done.add(_key(line))
        size = f"width {case['width']}, depth {case['depth']}"
        print(f"{size}, lr {case['lr']:.2e}: {line['loss']:.4f}", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


KEY = ("rules", "optim", "experts", "steps", "batch", "width", "depth", "lr", "seed")


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in KEY)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def show(path: Path) -> None:
    """Optima of each group of runs that differ in size and rate alone."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in _lines(path):
        group = tuple(line[name] for name in ("rules", "optim", "experts", "steps", "batch"))
        if line["depth"] == 2:
            groups.setdefault((*group, "width"), []).append(line)
        if line["width"] == DEPTH_WIDTH:
            groups.setdefault((*group, "depth"), []).append(line)
    for (*group, axis), lines in groups.items():
        sizes: dict[float, list[tuple[float, float]]] = {}
        for line in lines:
            if math.isfinite(line["loss"]):
                sizes.setdefault(line[axis], []).append((line["lr"], line["loss"]))
        whole = {size: points for size, points in sizes.items() if len(points) >= 3}
        if len(whole) < 2:
            continue
        optima = fit_optima(whole)
        rules, optim, experts, steps, batch = group
        print(f"rules {rules}, {optim}, {experts} experts, {steps} steps of {batch} sequences")
        print(f"{axis:>8} {'best of grid':>13} {'parabola':>10} {'90 % interval':>20} {'loss':>8}")
        for o in optima:
            points = sizes[o.size]
            best = min({lr for lr, _ in points}, key=lambda lr, p=points: _mean(p, lr))
            low, high = o.interval
            edge = "" if o.inside else "  at the edge"
            print(
                f"{o.size:8g} {best:13.2e} {o.value:10.2e} {low:9.2e} to {high:8.2e}"
                f" {o.loss:8.4f}{edge}"
            )
        values = [math.log2(o.value) for o in optima]
        print(f"moves by {max(values) - min(values):.2f} octaves", end="")
        if sum(o.inside for o in optima) > 1:
            law = fit_power_law(optima)
            low, high = law.power_interval
            print(f"; as {axis} to the {law.power:+.2f} ({low:+.2f} to {high:+.2f})", end="")
        print("\n")


def _mean(points: list[tuple[float, float]], lr: float) -> float:
    return float(np.mean([loss for own, loss in points if own == lr]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="runs what the file does not have")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--rules", choices=("all", "none"), default="all")
    one.add_argument("--optim", choices=("adamw", "muon"), default="adamw")
    one.add_argument("--experts", type=int, default=1)
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--batch", type=int, default=4, help="sequences of a step")
    one.add_argument("--octaves", type=int, default=3, help="on both sides of the ladder's rate")
    one.add_argument("--seeds", type=int, default=1)
    one.add_argument("--widest", type=int, default=WIDTHS[-1])
    one.add_argument("--deepest", type=int, default=DEPTHS[-1])
    one.add_argument("--bytes", type=int, default=8_000_000, help="of training text")
    two = commands.add_parser("show", help="optima by size")
    two.add_argument("path", type=Path)
    args = parser.parse_args(argv)
    if args.command == "run":
        sweep(args)
    else:
        show(args.path)


if __name__ == "__main__":
    main()
