"""The whole training step: tokens/s, model FLOP/s and MFU of several shapes, in one process.

    python benchmarks/step.py                      every row, measured in turns; one table
    python benchmarks/step.py --rows moe8 dense    some of them
    python benchmarks/step.py --json               one line of JSON
    python benchmarks/step.py --profile /tmp/t     leaves a trace of each row for xprof
    python benchmarks/step.py --rows moe64 --vary model.expert_path=blocked,kernel,batched
    python benchmarks/step.py --rows moe64 --set mesh.expert=4 \
        --vary model.expert_exchange=all_to_all,all_gather        on emulated devices
    python benchmarks/step.py --rows moe8 --vary train.batch_size=2,8,32   how it scales in tokens

Rows run in turns, so that what else the machine does falls on all of them; the ratio to the dense
model of equal active FLOPs is what counts. The router learns on real text while it is measured,
nothing is dropped, and MFU is of the large-matmul peak that this machine shows in the same minute.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, replace
from jaxmoe.config_check import check
from jaxmoe.data.cache import prepare
from jaxmoe.data.loader import Stream
from jaxmoe.model.cost import cost
from jaxmoe.run import platform, xla
from jaxmoe.run.state import TrainState, init_state
from jaxmoe.run.step import Batch, train_step

ROOT = Path(__file__).resolve().parents[1]
TURNS = 3


def shapes() -> dict[str, Config]:
    """The shape that MaxText and transformers were measured on (issue 4), and its relatives."""
    base = ModelConfig(
        vocab_size=8192,
        d_model=256,
        n_layers=4,
        n_heads=4,
        n_kv_heads=4,
        d_head=64,
        d_ff=512,
        n_experts=8,
        top_k=2,
        qk_norm="none",
    )
    models = {
        "dense": replace(base, n_experts=1, top_k=1, d_ff=1024),
        "moe8": base,
        "moe64": replace(base, n_experts=64, top_k=8, d_ff=128),
        "moe128": replace(base, n_experts=128, top_k=8, d_ff=128),
    }
    train = TrainConfig(steps=10_000, batch_size=8, seq_len=256)
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=20)
    data = DataConfig(max_bytes=8_000_000, tokenizer_bytes=2_000_000, holdout_bytes=50_000)
    found = {
        name: Config(name=name, model=model, data=data, train=train, optim=optim)
        for name, model in models.items()
    }
    found["quickstart"] = config_lib.load(str(ROOT / "configs" / "quickstart.py"))
    return found


@dataclass
class Row:
    """One shape, compiled, with what was measured of it."""

    config: Config
    compiled: Any
    compile_seconds: float
    stream: Stream
    state: TrainState
    position: int = 0
    seconds: list[float] = field(default_factory=list)  # of each step
    peaks: list[float] = field(default_factory=list)  # FLOP/s
    last: Any = None

    def steps(self, n: int, *, keep: bool) -> None:
        for _ in range(n):
            batch = make_batch(self.config, self.stream, self.position)
            self.position += self.config.train.batch_size
            begin = time.perf_counter()
            self.state, self.last = self.compiled(self.state, batch)
            jax.block_until_ready(self.last)
            if keep:
                self.seconds.append(time.perf_counter() - begin)

    def result(self) -> dict[str, Any]:
        step = statistics.median(self.seconds)
        tokens = self.config.tokens_per_step
        flops = cost(self.config.model, self.config.train.seq_len).flops_per_token * tokens
        peak = statistics.median(self.peaks)
        router = self.last.router
        load = None if router is None else np.asarray(router.load_E)
        memory = self.compiled.memory_analysis()
        return {
            "row": self.config.name,
            "step_seconds": step,
            "tokens_per_second": tokens / step,
            "model_tflops": flops / step / 1e12,
            "mfu": flops / step / peak,
            "peak_tflops": peak / 1e12,
            "drop_rate": None if load is None else 0.0,  # dropless: model/moe.py
            "overflow_rate": None if router is None else float(np.asarray(router.overflow).mean()),
            "load_max": None if load is None else float(load.max()),
            "temporary_bytes": memory.temp_size_in_bytes,
            "compile_seconds": self.compile_seconds,
        }


def make_batch(config: Config, stream: Stream, position: int) -> Batch:
    tokens = stream.rows(position, 0, config.train.batch_size)
    weights = np.ones((len(tokens), config.train.seq_len), np.float32)
    sharding = mesh_lib.batch_sharding(mesh_lib.build(config.mesh), 2)
    return Batch(*(jax.device_put(a, sharding) for a in (tokens, weights)))


def build(config: Config) -> Row:
    corpus = prepare(config.data, config.model.vocab_size, lambda *_: None)
    stream = Stream(corpus.train, config.train.seq_len, config.seed)
    state = init_state(config, mesh_lib.build(config.mesh))
    begin = time.perf_counter()
    lowered = train_step.lower(state, make_batch(config, stream, 0), config)
    compiled, _ = xla.compile_with_options(lowered)  # as the loop does
    return Row(config, compiled, time.perf_counter() - begin, stream, state)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=shapes(), default=list(shapes()))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--vary", metavar="KEY=V,V", help="each row with each of these values of one config key"
    )
    parser.add_argument("--steps", type=int, default=10, help="measured in each of three turns")
    parser.add_argument("--warm", type=int, default=30, help="before: the router learns")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--profile", metavar="DIR", help="a trace of three steps of each row")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    configs = [config_lib.apply_sets(shapes()[name], args.set) for name in args.rows]
    configs = [replace(c, model=replace(c.model, dtype=args.dtype)) for c in configs]
    configs = [variant for c in configs for variant in variants(c, args.vary)]
    for config in configs:
        check(config)
    platform.start(configs[0])
    mesh = mesh_lib.build(configs[0].mesh)
    with jax.set_mesh(mesh):
        rows = [build(config) for config in configs]
        for row in rows:
            row.steps(args.warm, keep=False)
    for _ in range(TURNS):
        for row in rows:
            row.peaks.append(platform.measured_peak(args.dtype))  # of one device: outside the mesh
            with jax.set_mesh(mesh):
                row.steps(args.steps, keep=True)
    for row in rows if args.profile else ():
        with jax.set_mesh(mesh), jax.profiler.trace(f"{args.profile}/{row.config.name}"):
            row.steps(3, keep=False)
    results = [row.result() for row in rows]
    show(results, platform.describe_devices(), as_json=args.json)


def variants(config: Config, vary: str | None) -> list[Config]:
    if vary is None:
        return [config]
    key, values = vary.split("=", 1)
    made = [(v, config_lib.apply_sets(config, [f"{key}={v}"])) for v in values.split(",")]
    return [replace(c, name=f"{c.name} {value}") for value, c in made]


def show(results: list[dict[str, Any]], devices: str, *, as_json: bool) -> None:
    dense = next((r["model_tflops"] for r in results if r["row"] == "dense"), None)
    for r in results:
        r["of_dense"] = None if dense is None else r["model_tflops"] / dense
    if as_json:
        print(json.dumps({"devices": devices, "jax": jax.__version__, "rows": results}))
        return
    print(f"{devices}, jax {jax.__version__}")
    wide = max(len(r["row"]) for r in results)
    print(
        f"{'row':{wide}}  tokens/s  GFLOP/s   MFU  of dense  drops  overflows  load max  temp MB"
        "  compile s"
    )
    for r in results:
        of_dense = "" if r["of_dense"] is None else f"{r['of_dense']:8.2f}"
        load = "" if r["load_max"] is None else f"{r['load_max']:8.2f}"
        overflows = "" if r["overflow_rate"] is None else f"{r['overflow_rate']:.0%}"
        drops = "" if r["drop_rate"] is None else f"{r['drop_rate']:.0%}"
        print(
            f"{r['row']:{wide}} {r['tokens_per_second']:9,.0f} {1e3 * r['model_tflops']:8.1f}"
            f" {r['mfu']:5.0%}  {of_dense:8} {drops:>6}  {overflows:>9}  {load:8}"
            f" {r['temporary_bytes'] / 1e6:8.0f}  {r['compile_seconds']:9.1f}"
        )


if __name__ == "__main__":
    main()
