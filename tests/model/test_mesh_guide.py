"""docs/mesh.md: its tables are what Specs, rules, a traced layer and the plan say."""

import functools
import math
import re
import shlex
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe import config as config_lib
from jaxmoe import mesh as mesh_lib
from jaxmoe import model as model_package
from jaxmoe import train as train_command
from jaxmoe import tree
from jaxmoe.config import Config, MeshConfig, replace
from jaxmoe.model.lm import lm_specs
from jaxmoe.plan import __main__ as command
from jaxmoe.plan.forecast import step_time
from jaxmoe.plan.hardware import TABLE
from jaxmoe.plan.traffic import flows
from jaxmoe.run.step import abstract_batch, eval_step
from jaxmoe.spec import Spec, is_spec

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "mesh.md").read_text()
COMMANDS = re.findall(r"^    python -m (jaxmoe\.\w+) (.+)$", TEXT, re.M)
STACKS = ("rounds", "layers", "others")
ARRAY = re.compile(r"`(\w*)\[([^\]]+)\]`")
# Between them every kind of parameter that the family has.
CONFIGS = ("mixtral", "olmoe", "gpt_oss", "gpt4", "deepseek_v3", "llama", "qwen3_moe")
CHIP = TABLE["h100"]


def table(first: str) -> list[list[str]]:
    """Cells of the rows below the header that begins with this cell."""
    lines = TEXT.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


LETTERS = {row[0].strip("`"): row[1].strip("`") for row in table("letter")}


def axes_of(text: str) -> tuple[tuple[str, ...], ...]:
    """ "D_dc, F_m" -> the mesh axes of each dim."""
    dims = [dim.partition("_")[2] for dim in text.split(", ")]
    return tuple(tuple(LETTERS[letter] for letter in dim) for dim in dims)


def dims_of(text: str) -> str:
    return "".join(dim[0] for dim in text.split(", "))


def entries(spec: P, ndim: int) -> tuple[tuple[str, ...], ...]:
    found = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    return (*found, *[()] * (ndim - len(found)))


def test_letters_are_of_the_axes_and_of_no_dim() -> None:
    assert tuple(LETTERS.values()) == mesh_lib.AXES
    assert all(letter == axis[0] for letter, axis in LETTERS.items())
    legend = set(re.findall(r"(?<=[ ,])([A-Z])(?=[ ,])", str(model_package.__doc__)))
    assert set("ABCDEFGHIJKLMNOPQRSTUVWXY") == legend, "the guide says that only Z is free"
    for letter, axis in LETTERS.items():
        spread = table("letter")[list(LETTERS).index(letter)][2]
        assert spread.startswith("no") == (axis not in mesh_lib.BATCH)


def documented() -> dict[str, set[tuple[Any, ...]]]:
    """By parameter: (letters, at rest, in use, dtype, gathered by) of each form that it has."""
    found: dict[str, set[tuple[Any, ...]]] = {}
    for names, used, dtype, by in table("parameter, at rest"):
        arrays, in_use = ARRAY.findall(names), [text for _, text in ARRAY.findall(used)]
        if used == "the same":
            in_use = [text for _, text in arrays]
        if len(in_use) == 1:
            in_use *= len(arrays)
        for (name, rest), use in zip(arrays, in_use, strict=True):
            assert dims_of(rest) == dims_of(use), name
            row = (dims_of(rest), axes_of(rest), axes_of(use), dtype, by)
            found.setdefault(name, set()).add(row)
    return found


@functools.cache
def forms(name: str) -> dict[str, set[tuple[Any, ...]]]:
    """The same of the parameters of a config, from their Specs and the rule tables."""
    found: dict[str, set[tuple[Any, ...]]] = {}
    for path, stacked in tree.named_leaves(lm_specs(load(name).model), is_leaf=is_spec):
        spec = unstacked(stacked)
        rest, layer, used = (
            entries(mesh_lib.partition(spec, rules), len(spec.shape))
            for rules in (mesh_lib.STORE, mesh_lib.COMPUTE, mesh_lib.IN_USE)
        )
        by = "-" if rest == used else "layer" if layer == used else "experts"
        assert by != "experts" or layer == rest, "a part is gathered here and a part there"
        row = (letters_of(path, spec), rest, used, "model" if spec.cast else "float32", by)
        found.setdefault(path.split("/")[-1], set()).add(row)
    return found


def load(name: str) -> Config:
    return config_lib.load(str(ROOT / "configs" / f"{name}.py"))


def unstacked(spec: Spec) -> Spec:
    n = sum(axis in STACKS for axis in spec.axes)
    return replace(spec, shape=spec.shape[n:], axes=spec.axes[n:])


def letters_of(path: str, spec: Spec) -> str:
    suffix = path.split("_")[-1]
    if suffix.isupper():
        return suffix
    heads = "K" if path.endswith("k_norm") else "N"  # norms of heads have no suffix
    return "".join({"heads": heads}.get(axis, "H") for axis in spec.axes)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_where_the_guide_says(name: str) -> None:
    told = documented()
    for parameter, rows in forms(name).items():
        assert rows <= told.get(parameter, set()), (parameter, rows, told.get(parameter))


def test_no_parameter_of_the_guide_is_made_up() -> None:
    real: dict[str, set[tuple[Any, ...]]] = {}
    for name in CONFIGS:
        for parameter, rows in forms(name).items():
            real.setdefault(parameter, set()).update(rows)
    for parameter, rows in documented().items():
        # MLA's queries straight from D are the same matrix with Q = D.
        assert rows <= real.get(parameter, set()), (parameter, rows)


def test_stacks_rest_as_the_guide_says() -> None:
    words = " ".join(TEXT.split())
    assert "`R_s` in the segment that a pipeline spreads" in words
    assert "`R` in the others" in words
    assert [mesh_lib.STORE[axis] for axis in STACKS] == [(), ("stage",), ()]


MESH = MeshConfig(stage=2, data=2, context=2, expert=2, model=2)


@functools.cache
def seen() -> dict[tuple[str, str], set[Any]]:
    """Shardings of the arrays in functions of jaxmoe/model, while a forward pass is traced."""
    # Two layers in the pipeline, and a module for a further token outside of it.
    config = load("mixtral")
    model = replace(config.model, n_layers=2, n_mtp=1, loss_chunk=8)
    train = replace(config.train, batch_size=16, seq_len=64)
    config = replace(config, model=model, mesh=MESH, train=train)
    folder = str(Path(jaxmoe.__file__).parent / "model")
    found: dict[tuple[str, str], set[Any]] = {}

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "return" or not frame.f_code.co_filename.startswith(folder):
            return
        for name, value in frame.f_locals.items():
            if isinstance(value, jax.Array) and value.ndim > 1:
                spec = entries(jax.typeof(value).sharding.spec, value.ndim)
                found.setdefault((frame.f_code.co_name, name), set()).add(spec)

    mesh = mesh_lib.abstract(config.mesh, 32)
    before = sys.getprofile()
    with jax.sharding.use_abstract_mesh(mesh):
        params = abstract_params(lm_specs(model), mesh)
        batch = abstract_batch(config, mesh)
        sys.setprofile(profile)
        try:
            jax.eval_shape(eval_step, params, batch, config)
        finally:
            sys.setprofile(before)
    return found


def abstract_params(specs: Any, mesh: Any) -> Any:
    def one(spec: Spec, where: Any) -> Any:
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=where)

    return jax.tree.map(one, specs, mesh_lib.shardings(specs, mesh), is_leaf=is_spec)


def test_a_layers_arrays_are_where_the_guide_says() -> None:
    """Outside of the pipeline; inside it the same but for `stage`."""
    rows = table("in")
    assert len(rows) > 8
    for function, array, _ in rows:
        ((name, text),) = ARRAY.findall(array)
        assert dims_of(text) == name.split("_")[1], array
        real = seen()[function.strip("`"), name]
        told = axes_of(text)
        inside = tuple(tuple(axis for axis in dim if axis != "stage") for dim in told)
        assert told in real and real <= {told, inside}, (function, array, real)


# The formulas


def told_config() -> Config:
    """Of the guide's first command of the plan, which the table's numbers are of."""
    args = arguments("jaxmoe.plan")[0]
    return config_lib.apply_sets(config_lib.load(str(ROOT / args.config)), args.set)


def arguments(module: str) -> list[Any]:
    assert module == "jaxmoe.plan"
    return [
        command._parser().parse_args(shlex.split(rest)) for name, rest in COMMANDS if name == module
    ]


def value(formula: str, config: Config, sizes: dict[str, int]) -> float:
    """A formula of the guide: bytes of a layer in one pass."""
    m, train = config.model, config.train
    here: dict[str, Any] = {letter: sizes[axis] for letter, axis in LETTERS.items()}
    ways = math.prod(sizes[axis] for axis in ("replica", "data", "expert", "context"))
    tokens = train.batch_size * train.seq_len / ways / train.accumulate
    own = tokens / sizes["model"] if sizes["expert"] > 1 else tokens
    here |= {"D": m.d_model, "H": m.d_head, "N": m.n_heads, "K": m.n_kv_heads, "F": m.d_ff}
    here |= {"E": m.n_experts, "A": m.top_k, "V": m.vocab_size, "L": train.seq_len}
    here |= {"t": tokens, "w": 2 if m.dtype == "bfloat16" else 4, "rounds": config.mesh.rounds}
    here["C"] = math.ceil(math.ceil(1.25 * own * m.top_k / m.n_experts) / 8) * 8
    here["P"] = parameters_at_rest(config, sizes)
    return eval(formula, {"__builtins__": {}}, here)  # of our own document, like the tests


def parameters_at_rest(config: Config, sizes: dict[str, int]) -> float:
    total = 0.0
    for spec in jax.tree.leaves(lm_specs(config.model), is_leaf=is_spec):
        axes = [a for dim in spec.axes for a in mesh_lib.STORE[dim]]
        total += spec.size / math.prod(sizes[a] for a in axes)
    return total


def formulas() -> dict[str, tuple[str, str]]:
    """(formula, MB) by what it is of."""
    found = {}
    for what, _, formula, megabytes in table("what, as the plan calls it"):
        found[what.split(";")[0]] = (formula.strip("`"), megabytes)
    return found


def sent(config: Config, n_layers: int, begins: str, axes: tuple[str, ...]) -> float:
    """Bytes of the plan's flows of that kind along these axes."""
    config = replace(config, model=replace(config.model, n_layers=n_layers))
    sizes = mesh_lib.sizes(config.mesh, 64)
    found = flows(config, sizes, CHIP)
    return sum(f.sent for f in found if f.kind.startswith(begins) and f.axes == axes)


# What the plan is asked for, by rows of the guide: its kind and axes, and the model's switches.
OF_A_LAYER: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "weights: attention, router": ("weights", ("data", "expert", "context"), {}),
    "weights: experts": ("weights", ("data", "context"), {}),
    "sums over heads": ("sums over heads", ("model",), {}),
    "keys and values, gathered": ("keys", ("context",), {"context_attention": "gather"}),
    "keys and values, in a ring": ("keys", ("context",), {"context_attention": "ring"}),
}
for way in ("all_to_all", "all_gather"):
    switch = {"expert_exchange": way}
    OF_A_LAYER[f"rows to experts and back, {way}"] = ("rows to experts", ("expert",), switch)
    OF_A_LAYER[f"experts' rows together, {way}"] = ("experts' rows", ("model",), switch)
MESHES = (
    MeshConfig(data=4, context=2, expert=4, model=2),
    MeshConfig(data=2, context=4, expert=2, model=4),
    MeshConfig(replica=2, data=2, context=2, expert=4, model=2),
)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: mesh_lib.describe(mesh_lib.sizes(m, 64)))
@pytest.mark.parametrize("row", OF_A_LAYER)
def test_bytes_of_a_layer_are_those_of_the_plan(row: str, mesh: MeshConfig) -> None:
    """What one layer more adds, in each part of the step."""
    kind, axes, switches = OF_A_LAYER[row]
    config = told_config()
    config = replace(config, mesh=mesh, model=replace(config.model, **switches))
    more = sent(config, 33, kind, axes) - sent(config, 32, kind, axes)
    told = value(formulas()[row][0], config, mesh_lib.sizes(mesh, 64))
    assert told > 0 and more / config.train.accumulate == pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize(
    ("row", "kind", "axes"),
    [
        ("outside of layers, weights: embedding, head", "weights", ("data", "expert", "context")),
        ("outside of layers, sums", "sums", ("model",)),
    ],
)
def test_bytes_outside_of_layers_are_those_of_the_plan(
    row: str, kind: str, axes: tuple[str, ...]
) -> None:
    config = told_config()
    at = [sent(config, n, kind, axes) for n in (1, 2)]
    told = value(formulas()[row][0], config, mesh_lib.sizes(config.mesh, 64))
    assert (2 * at[0] - at[1]) / config.train.accumulate == pytest.approx(told, rel=1e-6)


def test_bytes_between_stages_and_replicas_are_those_of_the_plan() -> None:
    config = replace(told_config(), mesh=MeshConfig(stage=2, data=4, expert=4, model=2, rounds=2))
    told = value(formulas()["activations to the next stage"][0], config, sizes_of(config))
    parts = config.train.accumulate
    assert sent(config, 32, "activations", ("stage",)) == pytest.approx(parts * told)
    config = replace(config, mesh=MeshConfig(replica=4, data=2, expert=4, model=2))
    told = value(formulas()["gradients added up, once a step"][0], config, sizes_of(config))
    assert sent(config, 32, "gradients", ("replica",)) == pytest.approx(told)


def sizes_of(config: Config) -> dict[str, int]:
    return mesh_lib.sizes(config.mesh, 64)


def test_numbers_of_the_guide_are_those_of_its_command() -> None:
    (args, _), config = arguments("jaxmoe.plan"), told_config()
    assert (args.hardware, args.devices) == (CHIP.name, 64)
    numbers = {row: (formula, mb) for row, (formula, mb) in formulas().items() if mb}
    assert len(numbers) == len(OF_A_LAYER) + 2
    for row, (formula, mb) in numbers.items():
        assert f"{value(formula, config, sizes_of(config)) / 1e6:.1f}" == mb, row
    step, found = step_time(config, 64, CHIP, None, CHIP.efficiency)
    (experts,) = [
        f for f in found if f.kind.startswith("weights") and f.axes == ("data", "context")
    ]
    mb = numbers["weights: experts"][1]
    layers, parts = config.model.n_layers, config.train.accumulate
    words = " ".join(TEXT.split())
    assert f"{layers} layers x {parts} parts x {mb} MB = {experts.sent / 1e9:.1f} GB" in words
    assert experts.bandwidth == 50e9
    assert f"{experts.seconds:.1f} s beside {step.compute:.1f} s of compute" in words
    faster = replace(config, mesh=MeshConfig(data=32, model=2))
    best = step_time(faster, 64, CHIP, None, CHIP.efficiency)[0].seconds
    assert f"data=32 x model=2, a step of {best:.1f} s against {step.seconds:.1f} s of the" in words
    kinds = {f.kind: f.sent for f in found}
    rows_sent = kinds["rows to experts and back"] / layers / parts / 1e6
    assert f"{rows_sent:.1f}" == numbers["rows to experts and back, all_to_all"][1], "auto's way"
    keys_sent = kinds["keys and values around the ring"] / layers / parts / 1e6
    assert f"{keys_sent:.1f}" == numbers["keys and values, gathered"][1], "auto's way"
    for link in (CHIP.link, CHIP.network):
        assert f"{CHIP.bf16 / link:,.0f}" in TEXT


def test_the_guides_commands_are_ones_that_exist() -> None:
    """Options by the real parsers, fields by the config."""
    for args in arguments("jaxmoe.plan"):
        assert args.hardware in TABLE
        config_lib.apply_sets(config_lib.load(str(ROOT / args.config)), args.set)
    assert [bool(args.search) for args in arguments("jaxmoe.plan")] == [False, True]
    (train,) = [shlex.split(rest) for name, rest in COMMANDS if name == "jaxmoe.train"]
    parsed = train_command._parser().parse_args(train)
    config_lib.apply_sets(load("mixtral"), parsed.set)
    for field in re.findall(r"`((?:mesh|model|optim|train)\.\w+)", TEXT):
        section, _, name = field.partition(".")
        of_module = section == "mesh" and hasattr(mesh_lib, name)
        assert of_module or hasattr(getattr(load("mixtral"), section), name), field
    for file in re.findall(
        r"(?:docs|configs|benchmarks|tests|jaxmoe|kernels|model)/\w[\w/]*\.\w+", TEXT
    ):
        assert any((at / file).is_file() for at in (ROOT, ROOT / "jaxmoe")), file
