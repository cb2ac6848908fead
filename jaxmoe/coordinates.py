"""`python -m jaxmoe.coordinates`: does a rate that was tuned on a small model fit wider and deeper
ones? Activations, and what a few updates change in them, are to be as large at every width and
depth (the coordinate check of Yang et al., arXiv:2203.03466, appendix D.1).

The model is trained for a few updates at a constant rate on sequences drawn here, and looked into
on others before and after. What is read goes through the model's own layers, and is checked to end
in the model's own logits.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe import transfer
from jaxmoe.config import Config, MeshConfig, ModelConfig, OptimConfig, TrainConfig, replace
from jaxmoe.config_check import check
from jaxmoe.errors import UserError
from jaxmoe.model.lm import Lm, embedded, lm_logits, logits, make_places
from jaxmoe.model.norm import rms_norm
from jaxmoe.model.stack import Kind, Layer, attend, feed, segments, unstaged
from jaxmoe.run import platform
from jaxmoe.run.state import init_state
from jaxmoe.run.step import Batch, train_step

Array = jax.Array
LIMIT = 1.5  # largest over smallest, of each reading over all sizes
WIDTHS, DEPTHS = (1, 4, 16), (1, 2, 8)  # times the base's
ROWS, LENGTH = 8, 32
UPDATES = 8

EXAMPLES = """examples:
  python -m jaxmoe.coordinates                            AdamW, 8 experts
  python -m jaxmoe.coordinates --set optim.name=muon --set optim.lr=0.04
  python -m jaxmoe.coordinates --set model.n_experts=1 --json
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. `sizes` and `changes` are root mean squares over tokens, features and layers, of
    each kind of activation after the updates, and of what the updates changed in it."""

    width: int
    depth: int
    sizes: Mapping[str, float]
    changes: Mapping[str, float]


def base() -> Config:
    """A small model with experts; what is checked are its larger relatives."""
    model = ModelConfig(
        vocab_size=64,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        d_head=16,
        d_ff=16,
        n_experts=8,
        top_k=2,
        loss_chunk=LENGTH,
        remat="none",
    )
    return Config(
        name="coordinates",
        model=model,
        optim=OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0),
        train=TrainConfig(steps=UPDATES, batch_size=ROWS, seq_len=LENGTH),
        mesh=MeshConfig(data=1),
    )


def scaled(config: Config, width: int = 1, depth: int = 1) -> Config:
    """So many times as wide (more heads, wider experts) and as deep, with the rates of `config`."""
    m = config.model
    model = replace(
        m,
        d_model=m.d_model * width,
        n_heads=m.n_heads * width,
        n_kv_heads=m.n_kv_heads * width,
        d_ff=m.d_ff * width,
        d_ff_dense=m.d_ff_dense * width,
        n_layers=m.n_layers * depth,
        transfer=m.transfer or transfer.tuned_at(m),
    )
    return replace(config, model=model)


def read(config: Config, mesh: Mesh, seed: int = 0) -> Row:
    """Trains one model and looks into it before and after.

    Raises:
        UserError: a rate so high that something is no longer finite.
    """
    config = replace(config, seed=seed)
    m = config.model
    with jax.set_mesh(mesh):
        probe = _placed(_draw(m.vocab_size, seed, 0)[:, :-1], mesh)
        state = init_state(config, mesh)
        before = _look(state.params, probe, m)
        for step in range(1, UPDATES + 1):
            tokens = _draw(m.vocab_size, seed, step)
            batch = Batch(tokens_BL=tokens, weights_BL=np.ones_like(tokens[:, 1:], np.float32))
            state, _ = train_step(state, _placed(batch, mesh), config)
        after = _look(state.params, probe, m)
    sizes = {name: _rms(a) for name, a in after.items()}
    changes = {name: _rms(a - before[name]) for name, a in after.items()}
    if not all(math.isfinite(x) for x in (*sizes.values(), *changes.values())):
        raise UserError(f"optim.lr={config.optim.lr}: the updates diverge; give a lower one")
    return Row(width=m.d_model, depth=m.n_layers, sizes=sizes, changes=changes)


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Largest over smallest of each reading; 1 is flat."""
    found = {}
    for kind in ("sizes", "changes"):
        for name in getattr(rows[0], kind):
            values = [getattr(row, kind)[name] for row in rows]
            found[f"{kind}/{name}"] = max(values) / max(min(values), 1e-30)
    return found


def _draw(vocab: int, seed: int, step: int) -> np.ndarray:
    """int32 [ROWS, LENGTH + 1]: each token is one of four that may follow the last."""
    table = np.random.default_rng(seed).integers(0, vocab, (vocab, 4))
    rng = np.random.default_rng((seed, step))
    tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
    tokens[:, 0] = rng.integers(0, vocab, ROWS)
    for i in range(LENGTH):
        tokens[:, i + 1] = table[tokens[:, i], rng.integers(0, 4, ROWS)]
    return tokens


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, mesh_lib.batch_sharding(mesh, a.ndim)), tree)


@partial(jax.jit, static_argnums=2)
def _activations(params: Lm, tokens_BL: Array, cfg: ModelConfig) -> dict[str, Array]:
    """By kind, on a leading dim for the layers that have it. What branches give is read before it
    is scaled, since the scale falls with depth by itself."""
    scale = transfer.residual_scale(cfg)
    places = make_places(tokens_BL, None, cfg)
    x_BLD = embedded(params, tokens_BL, cfg)
    found: dict[str, list[Array]] = {"embedding": [x_BLD]}

    def period(x_BLD: Array, layers: Any, kinds: tuple[Kind, ...]) -> tuple[Array, Any]:
        read: list[tuple[str, Array]] = []
        for kind, layer in zip(kinds, layers, strict=True):
            a_BLD = attend(layer, x_BLD, places, cfg, kind)
            x_BLD = x_BLD + a_BLD
            y_BLD, _ = feed(layer, x_BLD, places, cfg, kind)
            read += [("attention", a_BLD / scale)]
            read += [("experts" if kind.moe else "feed-forward", y_BLD / scale)]
            if kind.moe:
                read.append(("router", _router_logits(layer, x_BLD, cfg)))
            x_BLD = x_BLD + y_BLD
        names = sorted({name for name, _ in read})
        return x_BLD, {n: jnp.stack([a for name, a in read if name == n]) for n in names}

    for segment, stacked in zip(segments(cfg), params.layers, strict=True):
        body = partial(period, kinds=segment.period)
        x_BLD, read = jax.lax.scan(body, x_BLD, jax.tree.map(unstaged, stacked))
        for name, a in read.items():
            found.setdefault(name, []).append(a.reshape(-1, *a.shape[2:]))
    found["stream"] = [x_BLD]
    found["logits"] = [logits(params, rms_norm(params.final_norm_D, x_BLD, cfg.norm_eps), cfg)]
    found["model's logits"] = [lm_logits(params, tokens_BL, cfg)]
    return {name: jnp.concatenate(arrays) for name, arrays in found.items()}


def _router_logits(layer: Layer, x_BLD: Array, cfg: ModelConfig) -> Array:
    h_BLD = rms_norm(layer.ffn_norm_D, x_BLD, cfg.norm_eps).astype(jnp.float32)
    return jnp.einsum("BLD,DE->BLE", h_BLD, layer.ffn.router.w_DE)


def _look(params: Lm, tokens_BL: Array, cfg: ModelConfig) -> dict[str, np.ndarray]:
    found = jax.device_get(_activations(params, tokens_BL, cfg))
    # Else what was read is not what the model does.
    np.testing.assert_allclose(found["logits"], found.pop("model's logits"), rtol=1e-3, atol=1e-4)
    return found


def _rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


# The command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe.coordinates",
        description="Are activations and their updates as large at every width and depth?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one config value"
    )
    parser.add_argument("--json", action="store_true", help="readings and ratios as JSON")
    args = parser.parse_args(argv)
    try:
        config = config_lib.apply_sets(base(), args.set)
        check(config)
        platform.start(config)
        rows = checked(config, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        print(f"jaxmoe.coordinates: {error}", file=sys.stderr)
        return 2
    flat = {axis: ratios(of_axis) for axis, of_axis in rows.items()}
    if args.json:
        plain = {axis: [asdict(row) for row in of_axis] for axis, of_axis in rows.items()}
        print(json.dumps({"rows": plain, "ratios": flat}))
    else:
        for axis, of_axis in rows.items():
            print(table(axis, of_axis))
    return 0 if max(max(of_axis.values()) for of_axis in flat.values()) <= LIMIT else 1


def checked(
    config: Config,
    widths: Sequence[int] = WIDTHS,
    depths: Sequence[int] = DEPTHS,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[Row]]:
    """Rows over the widths and over the depths, each times the base's."""
    # Of a host with more devices than these small models need, the first.
    wanted = mesh_lib.devices_wanted(config.mesh, 1)
    mesh = mesh_lib.over(config.mesh, jax.devices()[:wanted])
    known: dict[Config, Row] = {}
    rows: dict[str, list[Row]] = {"width": [], "depth": []}
    for axis, factors in (("width", widths), ("depth", depths)):
        for factor in factors:
            one = scaled(config, **{axis: factor})
            if one not in known:
                say(f"{axis} x {factor}")
                known[one] = read(one, mesh)
            rows[axis].append(known[one])
    return rows


def table(axis: str, rows: Sequence[Row]) -> str:
    """A line of each reading, at each size, with its ratio."""
    lines = [f"{axis:24}" + "".join(f"{getattr(row, axis):>10}" for row in rows) + "   ratio"]
    for name, ratio in ratios(rows).items():
        kind, key = name.split("/")
        values = "".join(f"{getattr(row, kind)[key]:10.3g}" for row in rows)
        lines.append(f"{name:24}{values}{ratio:8.2f}{'' if ratio <= LIMIT else '  not flat'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
