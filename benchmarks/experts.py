"""The expert feed-forward alone, forward and backward, against a dense one of equal FLOPs.

    python benchmarks/experts.py                       every case, every path that runs here
    python benchmarks/experts.py --cases e8 e64        some cases
    python benchmarks/experts.py --paths blocked       one path
    python benchmarks/experts.py --json                one line of JSON

Dispatch, combination and gradients of rows, weights and combine weights are in it; the router is
not. Loads are those of a learned router: the most loaded expert has about 1.4 times its share.
Dense and experts run in turns, so that what else the machine does falls on both: the ratio counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe import mesh as mesh_lib
from jaxmoe.config import MeshConfig, ModelConfig, replace
from jaxmoe.model.ffn import Ffn, ffn, ffn_specs
from jaxmoe.model.moe import Experts, experts, moe_specs, path_of
from jaxmoe.run import platform
from jaxmoe.spec import Spec, is_spec

TOKENS = 4096


def cases() -> dict[str, ModelConfig]:
    """Of equal active FLOPs, but for e64wide and the quickstart's own."""

    def shape(d_model: int, n_experts: int, top_k: int, d_ff: int) -> ModelConfig:
        return ModelConfig(d_model=d_model, n_experts=n_experts, top_k=top_k, d_ff=d_ff)

    return {
        "e8": shape(256, 8, 2, 512),
        "e16": shape(256, 16, 4, 256),
        "e64": shape(256, 64, 8, 128),
        "e128": shape(256, 128, 8, 128),
        "e64wide": shape(256, 64, 2, 512),
        "quickstart": shape(128, 8, 2, 128),
    }


def draw(specs: Any, seed: int, dtype: str) -> Any:
    """Weights as a layer has them after its gather."""
    rng = np.random.default_rng(seed)

    def one(spec: Spec) -> jax.Array:
        a = rng.normal(size=spec.shape) * spec.shape[-2] ** -0.5
        return jax.device_put(jnp.asarray(a, dtype), mesh_lib.partition(spec, mesh_lib.COMPUTE))

    return jax.tree.map(one, specs, is_leaf=is_spec)


def rows(a: Any, dtype: Any) -> jax.Array:
    return jax.device_put(jnp.asarray(a, dtype), P(mesh_lib.BATCH, "context", None))


def choices(cfg: ModelConfig, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids [1, T, A] and weights; a token's choices differ, experts are mildly uneven."""
    rng = np.random.default_rng(seed)
    popularity = rng.normal(size=cfg.n_experts) * 0.25
    score = popularity + rng.gumbel(size=(tokens, cfg.n_experts))
    ids = np.argsort(-score, axis=1)[:, : cfg.top_k]
    weights = rng.dirichlet(np.ones(cfg.top_k), size=tokens)
    return ids[None].astype(np.int32), weights[None].astype(np.float32)


def dense_step(cfg: ModelConfig, w: Ffn, x_BLD: jax.Array, dy_BLD: jax.Array) -> Any:
    _, pull = jax.vjp(partial(ffn, cfg=cfg), w, x_BLD)
    return pull(dy_BLD)


def expert_step(
    cfg: ModelConfig,
    w: Experts,
    x_BLD: jax.Array,
    dy_BLD: jax.Array,
    weights: jax.Array,
    ids: jax.Array,
) -> Any:
    _, pull, _ = jax.vjp(
        lambda w, x, u: experts(cfg, x, u, ids, w), w, x_BLD, weights, has_aux=True
    )
    return pull(dy_BLD)


def timed(run: Callable[[], Any], seconds: float) -> list[float]:
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - begin)
    return found


def measure(name: str, cfg: ModelConfig, tokens: int, dtype: str, seconds: float) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    x, dy = (rows(rng.normal(size=(1, tokens, cfg.d_model)), dtype) for _ in range(2))
    chosen, shares = choices(cfg, tokens)
    ids, weights = rows(chosen, jnp.int32), rows(shares, jnp.float32)
    dense_w = draw(ffn_specs(cfg, cfg.d_ff * cfg.top_k), 2, dtype)
    expert_w = draw(moe_specs(cfg).experts, 3, dtype)
    dense = jax.jit(partial(dense_step, cfg)).lower(dense_w, x, dy).compile()
    begin = time.perf_counter()
    moe: Any = jax.jit(partial(expert_step, cfg)).lower(expert_w, x, dy, weights, ids).compile()
    compile_seconds = time.perf_counter() - begin
    runs = (lambda: dense(dense_w, x, dy), lambda: moe(expert_w, x, dy, weights, ids))
    for run in runs:
        jax.block_until_ready(run())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for kept, run in zip(times, runs, strict=True):
            kept += timed(run, seconds / 5)
    dense_s, moe_s = (statistics.median(t) for t in times)
    flops = 18 * tokens * cfg.top_k * cfg.d_model * cfg.d_ff
    return {
        "case": name,
        "path": path_of(cfg),
        "dense_gflops": flops / dense_s / 1e9,
        "gflops": flops / moe_s / 1e9,
        "of_dense": dense_s / moe_s,
        "best_of_dense": min(times[0]) / min(times[1]),
        "load_max": float(np.bincount(chosen.ravel()).max() / (chosen.size / cfg.n_experts)),
        "temporary_bytes": moe.memory_analysis().temp_size_in_bytes,
        "compile_seconds": compile_seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=cases(), default=list(cases()))
    parser.add_argument("--paths", nargs="+", default=["auto"], help="of model.expert_path")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seconds", type=float, default=4, help="of each case and path, each way")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    results = []
    with jax.set_mesh(mesh_lib.build(MeshConfig())):
        for name in args.cases:
            for path in args.paths:
                cfg = replace(cases()[name], expert_path=path, dtype=args.dtype)
                results.append(measure(name, cfg, args.tokens, args.dtype, args.seconds))
    if args.json:
        print(json.dumps({"devices": platform.describe_devices(), "rows": results}))
        return
    print(
        f"{platform.describe_devices()}, {args.tokens} tokens, {args.dtype}, jax {jax.__version__}"
    )
    print("case        path      dense GFLOP/s  experts  of dense  best  load max  temp MB")
    for r in results:
        print(
            f"{r['case']:11} {r['path']:9} {r['dense_gflops']:13.1f} {r['gflops']:8.1f}"
            f" {r['of_dense']:9.2f} {r['best_of_dense']:5.2f} {r['load_max']:9.2f}"
            f" {r['temporary_bytes'] / 1e6:8.0f}"
        )


if __name__ == "__main__":
    main()
