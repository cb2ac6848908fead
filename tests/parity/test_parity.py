"""The model is transformers' model, to the digit: logits, loss, every gradient, greedy text, files.

One tiny random model of each architecture, float32 on both sides. Theirs is torch on CPU, in the
`parity` extra; `make test-parity` runs this and prints the largest error seen of each kind.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from meshes import on, put

from jaxmoe import mesh as mesh_lib
from jaxmoe import tree
from jaxmoe.config import ModelConfig, replace
from jaxmoe.convert import safetensors, transfer
from jaxmoe.model.lm import lm_logits, lm_loss, lm_specs, mtp_logits
from jaxmoe.run.params import Params, open_params
from jaxmoe.spec import is_spec

theirs = pytest.importorskip("theirs", reason="needs torch and transformers: make test-parity")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch's and transformers' own
]
LENGTH, VOCAB = 17, 67
DOCUMENTS = (5, 1, 8, 3)  # lengths of what is packed into one row
LOGITS, LOSS, GRADIENT = 2e-5, 1e-6, 1e-4  # the limits
NAMES = [case.name for case in theirs.CASES]


@dataclass
class Pair:
    """The same model twice."""

    name: str
    theirs: Any
    params: Any
    cfg: ModelConfig
    stored: Params


@pytest.fixture(scope="module")
def errors() -> Iterator[dict[str, dict[str, float]]]:
    """The largest error of each kind by architecture; printed at the end for the record."""
    found: dict[str, dict[str, float]] = {}
    yield found
    print("\nlargest relative errors against transformers:")
    for name, kinds in found.items():
        print(f"  {name:22}" + "  ".join(f"{kind} {error:.1e}" for kind, error in kinds.items()))


@pytest.fixture(scope="module", params=NAMES)
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    built = theirs.build(theirs.BY_NAME[request.param], folder / "theirs")
    transfer.from_hf(folder / "theirs", folder / "ours", lambda *_: None)
    return make_pair(request.param, built, folder / "ours")


def make_pair(name: str, built: Any, ours: Path) -> Pair:
    stored = open_params(ours)
    # No auxiliary losses: theirs are other ones, and tests/model holds ours.
    router = replace(stored.model.router, load_balance_coef=0.0, z_coef=0.0)
    cfg = replace(stored.model, router=router, z_loss_coef=0.0, loss_chunk=LENGTH)
    return Pair(name=name, theirs=built, params=load(stored), cfg=cfg, stored=stored)


def load(stored: Params) -> Any:
    mesh, specs = on(), lm_specs(stored.model)
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, np.float32, sharding=sharding),
        specs,
        mesh_lib.shardings(specs, mesh),
        is_leaf=is_spec,
    )
    return stored.load(abstract)


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (3, LENGTH)).astype(np.int32)


def our_logits(pair: Pair, tokens: np.ndarray, documents: np.ndarray | None = None) -> np.ndarray:
    with jax.set_mesh(on()):
        placed = None if documents is None else put(on(), documents)
        return np.asarray(_logits(pair.params, put(on(), tokens), pair.cfg, placed))


_logits = jax.jit(lm_logits, static_argnums=2)


def check(errors: Any, pair: Pair, kind: str, got: Any, want: Any, limit: float) -> None:
    """|got - want| over the largest |want|."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.abs(want).max() > 0
    error = float(np.abs(got - want).max() / np.abs(want).max())
    of_model = errors.setdefault(pair.name, {})
    of_model[kind] = max(error, of_model.get(kind, 0.0))
    assert error <= limit, f"{kind}: {error:.3g} is over {limit}"


def test_logits(pair: Pair, errors: Any) -> None:
    want = theirs.logits(pair.theirs.model, tokens())
    check(errors, pair, "logits", our_logits(pair, tokens()), want, LOGITS)


def test_logits_with_padding_on_the_left(pair: Pair, errors: Any) -> None:
    """As when prompts of several lengths make a batch: documents 0 is padding."""
    pad = np.array([0, 3, 9])[:, None]
    real = (np.arange(LENGTH)[None] >= pad).astype(np.int32)
    positions = np.maximum(real.cumsum(1) - 1, 0)
    torch = theirs.torch
    want = theirs.logits(
        pair.theirs.model,
        tokens(),
        attention_mask=torch.tensor(real),
        position_ids=torch.tensor(positions),
    )
    got = our_logits(pair, tokens(), real)
    check(errors, pair, "padded", got[real > 0], want[real > 0], LOGITS)


def test_logits_of_packed_documents(pair: Pair, errors: Any) -> None:
    """A row of several documents gives each of them what it gets alone."""
    row = tokens()[:1]
    documents = np.repeat(np.arange(1, len(DOCUMENTS) + 1), DOCUMENTS)[None].astype(np.int32)
    got = our_logits(pair, row, documents)[0]
    ends = np.cumsum(DOCUMENTS)
    alone = [
        theirs.logits(pair.theirs.model, row[:, end - n : end])[0]
        for n, end in zip(DOCUMENTS, ends, strict=True)
    ]
    check(errors, pair, "packed", got, np.concatenate(alone), LOGITS)


def test_loss_and_every_gradient(pair: Pair, errors: Any, tmp_path: Path) -> None:
    """Cross-entropy with targets left out, with that of MTP modules where there are any."""
    inputs, targets = tokens(), np.random.default_rng(1).integers(0, VOCAB, (3, LENGTH))
    targets[:, :-1] = inputs[:, 1:]
    weights = np.random.default_rng(2).choice([0.0, 1.0], (3, LENGTH)).astype(np.float32)
    value, want = their_loss(pair, inputs, np.where(weights > 0, targets, -100))
    with jax.set_mesh(on()):
        args = put(on(), (inputs, targets.astype(np.int32), weights))
        (total, nll), grads = _loss_and_gradients(pair.params, *args, pair.cfg)
    assert abs(float(nll) - want) <= LOSS * max(1.0, abs(want))
    check(errors, pair, "loss", [float(total)], [float(value.detach())], LOSS)

    value.backward()
    theirs.save_gradients(pair.theirs, tmp_path / "gradients")
    transfer.from_hf(tmp_path / "gradients", tmp_path / "ours", lambda *_: None)
    wanted = open_params(tmp_path / "ours")
    for name, grad in tree.named_leaves(grads):
        if not name.endswith("balance_bias_E"):  # moved by its rule, not by a gradient
            check(errors, pair, "gradient", grad, wanted.read(name), GRADIENT)


@functools.partial(jax.jit, static_argnums=4)
def _loss_and_gradients(
    params: Any, inputs: Any, targets: Any, weights: Any, cfg: ModelConfig
) -> Any:
    def loss(params: Any) -> Any:
        sums, _ = lm_loss(params, inputs, targets, weights, cfg)
        return sums.total / sums.weight, sums.nll / sums.weight

    return jax.value_and_grad(loss, has_aux=True)(params)


def their_loss(pair: Pair, inputs: np.ndarray, targets: np.ndarray) -> tuple[Any, float]:
    """The whole objective as a tensor, and its part for the next token."""
    built = pair.theirs
    out = built.model(input_ids=theirs.torch.tensor(inputs), use_cache=False)
    total = main = theirs.cross_entropy(out.logits, targets)
    if built.mtp is not None:
        for k, logits in enumerate(theirs.mtp_logits(built, inputs, keep_graph=True), start=1):
            further = theirs.cross_entropy(logits, targets[:, k:])
            total = total + pair.cfg.mtp_coef / pair.cfg.n_mtp * further
    return total, float(main.detach())


def test_greedy_text(pair: Pair) -> None:
    """32 tokens after a prompt, theirs with its cache, ours without one."""
    reloaded = theirs.load(pair.theirs.folder) if is_spent(pair) else pair.theirs
    prompt, n = tuple(tokens()[0, :5].tolist()), 32
    want = theirs.greedy(reloaded.model, prompt, n)
    row = np.zeros((1, len(prompt) + n), np.int32)
    row[0, : len(prompt)] = prompt
    for i in range(len(prompt), row.shape[1]):
        row[0, i] = our_logits(pair, row)[0, i - 1].argmax()
    assert row[0].tolist() == want
    assert len(set(want)) > 5  # no loop of one token


def is_spent(pair: Pair) -> bool:
    """Its parameters are gradients by now."""
    return any(p.grad is not None for p in pair.theirs.model.parameters())


def test_mtp_logits(pair: Pair, errors: Any) -> None:
    """From files of ours, loaded as a user of transformers would."""
    if not pair.cfg.n_mtp:
        assert pair.params.mtp == ()
        return
    out = pair.theirs.folder.parent / "mtp"
    transfer.to_hf(pair.stored.where, out, None, lambda *_: None)
    want = theirs.mtp_logits(theirs.load(out, mtp=True), tokens())
    with jax.set_mesh(on()):
        found = jax.jit(mtp_logits, static_argnums=2)(pair.params, put(on(), tokens()), pair.cfg)
    for got, wanted in zip(found, want, strict=True):
        check(errors, pair, "mtp", got, wanted, LOGITS)


def test_round_trip_is_bitwise(pair: Pair, tmp_path: Path) -> None:
    """Theirs -> ours -> theirs -> ours, over several files; and transformers loads the result."""
    transfer.to_hf(pair.stored.where, tmp_path / "out", None, lambda *_: None, shard=20_000)
    first = safetensors.tensors(pair.theirs.folder)
    second = safetensors.tensors(tmp_path / "out")
    assert first.keys() == second.keys()
    assert len({t.file for t in second.values()}) > 2
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        np.testing.assert_array_equal(tensor.read(), second[name].read(), err_msg=name)

    transfer.from_hf(tmp_path / "out", tmp_path / "back", lambda *_: None)
    back = open_params(tmp_path / "back")
    assert back.model == pair.stored.model
    for name, _ in tree.named_leaves(lm_specs(back.model), is_leaf=is_spec):
        np.testing.assert_array_equal(back.read(name), pair.stored.read(name), err_msg=name)

    loaded = theirs.load(tmp_path / "out")
    want = theirs.logits(theirs.load(pair.theirs.folder).model, tokens())
    np.testing.assert_array_equal(theirs.logits(loaded.model, tokens()), want)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["architectures"] == [type(loaded.model).__name__]
