"""The memory forecast against XLA's own account of the compiled train step, on emulated devices."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import meshes
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

from jaxmoe.config import Config, MeshConfig, ModelConfig, TrainConfig, replace
from jaxmoe.errors import UserError
from jaxmoe.plan import liveness
from jaxmoe.plan.aot import lower
from jaxmoe.plan.memory import Memory, forecast, microbatches, state_bytes

MODEL = ModelConfig(
    vocab_size=2048, d_model=192, n_layers=5, n_heads=6, n_kv_heads=2, d_head=32, d_ff=224
)
DENSE = replace(MODEL, n_experts=1, top_k=1, d_ff=448)
TRAIN = TrainConfig(batch_size=16, seq_len=256)

CASES = {
    "one device": (MODEL, MeshConfig()),
    "dense, sharded": (DENSE, MeshConfig(data=2, model=2)),
    "experts over devices": (MODEL, MeshConfig(expert=4, data=2)),
}


@pytest.fixture
def as_in_training() -> Iterator[None]:
    """With all optimisations, or memory is not what it will be."""
    jax.config.update("jax_disable_most_optimizations", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    compilation_cache.reset_cache()


def compiled(config: Config, n: int) -> Any:
    axes = {axis: getattr(config.mesh, axis) for axis in ("data", "expert", "model")}
    mesh = meshes.on(**{**axes, "data": n // (axes["expert"] * axes["model"])})
    return lower(config, mesh).compile()


@pytest.mark.usefixtures("as_in_training")
@pytest.mark.parametrize(
    "name",
    [
        "one device",
        "dense, sharded",
        # Its switch over sizes of buffers takes long to compile.
        pytest.param("experts over devices", marks=pytest.mark.slow),
    ],
)
def test_within_ten_percent_of_the_compiled_step(name: str) -> None:
    model, mesh = CASES[name]
    n = max(1, mesh.data) * mesh.expert * mesh.model
    config = Config(model=model, train=TRAIN, mesh=mesh)
    analysis = compiled(config, n).memory_analysis()
    arguments = analysis.argument_size_in_bytes
    real = arguments + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    real += analysis.temp_size_in_bytes
    guess = forecast(config, n, "cpu")
    # What comes in is exact, but for the step's number.
    assert guess.state + guess.batch == pytest.approx(arguments, abs=64)
    assert guess.peak == pytest.approx(real, rel=0.1)
    # All of it matters here: none could be forgotten and the total still be near.
    assert min(guess.state, guess.kept, guess.working) > 0.1 * real


def found(**changes: Any) -> Memory:
    """Of a model large enough that nothing rounds, traced only."""
    sets = {"mesh": MeshConfig(**changes.pop("mesh", {})), "train": changes.pop("train", TRAIN)}
    n = changes.pop("n", 1)
    return forecast(Config(model=replace(MODEL, **changes), **sets), n, "cpu")


def test_rematerialisation_keeps_less_and_batch_scales_what_is_kept() -> None:
    full = found()
    assert found(remat="none").kept > 1.5 * full.kept
    twice = found(train=replace(TRAIN, batch_size=32))
    assert twice.parameters == full.parameters and twice.gradients == pytest.approx(
        full.gradients, rel=0.2
    )
    assert 1.6 < twice.kept / full.kept < 2.0  # experts' gathered weights are kept, too


def test_fsdp_divides_state_and_gradients() -> None:
    one, eight = found(), found(n=8, mesh={"data": 8})
    assert one.state / eight.state == pytest.approx(8, rel=0.01)
    assert eight.gradients < one.gradients / 6


def test_stages_divide_layers_and_keep_all_microbatches() -> None:
    """A stage of two has half of the layers; it keeps what all microbatches leave, bubbles too."""
    mesh = {"stage": 2, "rounds": 1, "microbatches": 4}
    config = Config(model=replace(MODEL, n_layers=8), train=TRAIN, mesh=MeshConfig(**mesh))
    plain = replace(config, mesh=MeshConfig())
    assert microbatches(config, 2) == 4 and microbatches(plain, 1) == 1
    layers = state_bytes(plain, 1)[0] - 4 * 2 * 2048 * 192
    assert state_bytes(config, 2)[0] == pytest.approx(layers / 2 + 4 * 2 * 2048 * 192, rel=0.01)
    with pytest.raises(
        UserError, match="layers dim of 8 does not divide over the mesh axes stage=3"
    ):
        state_bytes(replace(config, mesh=MeshConfig(stage=3)), 3)


# The rules of liveness, each on a program of a few lines.


def peak(function: Any, *shapes: tuple[int, ...], cpu: bool = False) -> int:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return liveness.peak_of(jax.make_jaxpr(function)(*inputs), {}, cpu=cpu).size


def test_elementwise_work_has_no_buffer_and_matmuls_do() -> None:
    n = 64
    square = 4 * n * n
    assert peak(lambda a: (jnp.tanh(a) * 2 + a).sum(), (n, n)) == 4
    # The operand that is computed, and the product.
    assert peak(lambda a: jnp.tanh(a) @ a, (n, n)) == 2 * square
    # The first product dies before the third is made.
    assert peak(lambda a: ((a @ a) @ a) @ a, (n, n)) == 2 * square


def test_a_loop_keeps_what_it_stacks_and_one_iteration() -> None:
    def loop(x: Any, w: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            return x @ w, x

        return jax.lax.scan(body, x, None, length=10)

    n = 32
    found = peak(loop, (n, n), (n, n))
    # Ten kept, the carry, and the product that becomes the next one.
    assert found == pytest.approx((10 + 1 + 1) * 4 * n * n, rel=0.01)


def test_a_branch_needs_what_its_largest_needs() -> None:
    def branches(i: Any, a: Any) -> Any:
        return jax.lax.switch(
            i.astype(int), [lambda a: (a @ a) @ a, lambda a: jnp.tanh(a @ (a @ (a @ a)))], a
        )

    n = 32
    assert 2 * 4 * n * n <= peak(branches, (), (n, n)) <= 4 * 4 * n * n


def test_shards_count_and_not_wholes() -> None:
    """Rows over four, columns over two: the operand, its eighth; the product, before and after the
    sum over the two that share its contracted dim."""
    mesh = meshes.on(data=4, model=2)
    n = 64
    where = NamedSharding(mesh, jax.P("data", "model"))
    a = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=where)
    b = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, jax.P("model")))

    def product(a: Any, b: Any) -> Any:
        return jnp.einsum("ab,bc->ac", jnp.tanh(a), b, out_sharding=jax.P("data"))

    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(product)(a, b)
    whole = 4 * n * n
    assert liveness.peak_of(jaxpr, dict(mesh.shape)).size == whole / 8 + 2 * whole / 4
