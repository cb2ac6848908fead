"""Rules of a config that span fields: what pydantic's types cannot say (config.py)."""

import dataclasses
import itertools
import re

from jaxmoe import attention_paths, stores
from jaxmoe.config import Config, ModelConfig, RopeConfig, leaves
from jaxmoe.curriculum import Shape, curriculum
from jaxmoe.errors import UserError

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # of words that become paths


def check(config: Config) -> None:
    """Rules that span fields. Device counts are checked where devices are known (mesh.py)."""
    m, mesh = config.model, config.mesh
    _check_limits(config)
    _check_attention(m)
    attention_paths.check(m, config.data.document_mask, mesh.context > 1)
    _check_experts(m)
    _check_ramps(config)
    _check_mix(config)
    for shape in curriculum(config).shapes:
        _check_shape(config, shape)
    _check_length(config, config.train.seq_len)
    if not m.is_dense:
        _divides("mesh.expert", mesh.expert, "model.n_experts", m.n_experts)
    for dim in ("n_heads", "n_kv_heads", "d_ff", "d_ff_dense", "vocab_size"):
        # One key/value head is kept by all; d_ff_dense = 0 divides.
        if dim != "n_kv_heads" or m.n_kv_heads > 1:
            _divides("mesh.model", mesh.model, f"model.{dim}", getattr(m, dim))
    _require(
        mesh.rounds == 1 or mesh.stage > 1,
        f"mesh.rounds={mesh.rounds} needs a pipeline: set mesh.stage to more than 1",
    )
    _divides("mesh.stage", mesh.stage, "mesh.microbatches", mesh.microbatches)
    _require(mesh.data != 0, "mesh.data=0: give a size, or -1 for all devices that are left")
    _require(
        config.optim.name != "adafactor" or config.optim.moments == "float32",
        f"optim.moments={config.optim.moments}: optim.name=adafactor has factored moments alone,"
        " which are small; set it to float32",
    )
    _divides("eval.every", config.eval.every, "forecast.every", config.forecast.every)
    _divides("eval.every", config.eval.every, "forecast.first", config.forecast.first)
    if config.checkpoint.keep_best:  # or else some would have no loss to be compared by
        _divides("eval.every", config.eval.every, "checkpoint.every", config.checkpoint.every)
    if (mirror := config.checkpoint.mirror) is not None:
        _check_mirror(mirror)
    if config.data.tokenizer == "bytes":
        _require(m.vocab_size >= 257, f"model.vocab_size={m.vocab_size}: bytes need at least 257")


def _check_mirror(place: str) -> None:
    try:
        stores.opened(place)
    except UserError as error:
        raise UserError(
            f"checkpoint.mirror={error}; give a folder as gs://, s3:// or file:///PATH"
        ) from None


def _check_limits(config: Config) -> None:
    """Of the counters on the device, and of names that the file system is asked for."""
    for key, value in (
        ("train.steps", config.train.steps),
        ("optim.warmup_steps", config.optim.warmup_steps),
    ):
        _require(value < 2**31, f"{key}={value}: steps are counted in 31 bits; give fewer")
    for key, value in leaves(dataclasses.asdict(config)):
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                fits = not _UNFIT.search(text)
                fits = fits and all(len(part.encode()) <= 255 for part in text.split("/"))
                _require(fits, f"{key}={text!r:.80}: too long for a name, or control characters")


def _check_shape(config: Config, shape: Shape) -> None:
    _divides("train.accumulate", shape.accumulate, "train.batch_size", shape.batch)
    _check_length(config, shape.length)


def _check_length(config: Config, length: int) -> None:
    """Of the sequences of training, or of evaluation (train.seq_len)."""
    c, chunk = config.mesh.context, config.model.loss_chunk
    if c == 1:
        _divides("model.loss_chunk", chunk, "train.seq_len", length)
        return
    _require(
        length % (2 * c) == 0,
        f"train.seq_len={length} does not divide into the {2 * c} blocks of mesh.context={c}, two"
        " a device",
    )
    _divides("model.loss_chunk", chunk, "train.seq_len / mesh.context", length // c)


def _check_ramps(config: Config) -> None:
    t = config.train
    for key, stages in (
        ("train.batch_ramp", t.batch_ramp),
        ("train.length_ramp", t.length_ramp),
        ("data.phases", config.data.phases),
    ):
        starts = [stage.tokens for stage in stages]
        _require(
            all(a < b for a, b in itertools.pairwise(starts)),
            f"{key}: its tokens are {starts}; each stage begins after the one before",
        )
    for batch in (t.batch_size, *(stage.batch_size for stage in t.batch_ramp)):
        for stage in t.length_ramp:
            _require(
                batch * t.seq_len % stage.seq_len == 0,
                f"train.length_ramp: {batch} sequences of train.seq_len={t.seq_len} are"
                f" {batch * t.seq_len} tokens, no whole number of sequences of {stage.seq_len}",
            )
    lengths = {t.seq_len, *(stage.seq_len for stage in t.length_ramp)}
    odd = [length for length in sorted(lengths) if max(lengths) % length]
    _require(
        config.data.packing == "split" or not odd,
        f"train.length_ramp: with data.packing=best_fit {odd and odd[0]} must divide the longest"
        f" sequence, {max(lengths)}",
    )


def _check_mix(config: Config) -> None:
    data = config.data
    names = [source.name for source in data.sources]
    for name in names:
        _require(names.count(name) == 1, f"data.sources: {name!r} is there twice")
    for number, phase in enumerate(data.phases):
        named = [name for name, _ in phase.weights]
        for name in named:
            _require(
                name in names and named.count(name) == 1,
                f"data.phases[{number}]: {name!r} must be one of data.sources, once; these are"
                f" {', '.join(map(repr, names)) or 'not given'}",
            )
        _require(
            any(weight > 0 for _, weight in phase.weights),
            f"data.phases[{number}]: no source has a weight above 0",
        )


def _check_attention(m: ModelConfig) -> None:
    _divides("model.n_kv_heads", m.n_kv_heads, "model.n_heads", m.n_heads)
    if m.mla is None:
        _require(m.d_head % 2 == 0, f"model.d_head={m.d_head} must be even: RoPE turns pairs")
    else:
        width = m.mla.d_rope
        _require(width % 2 == 0, f"model.mla.d_rope={width} must be even: RoPE turns pairs")
        _require(
            m.n_kv_heads == m.n_heads,
            f"model.n_kv_heads={m.n_kv_heads}: with model.mla every head has its own keys; set it"
            f" to model.n_heads={m.n_heads}",
        )
        for name, plain in (("qk_norm", "none"), ("attention_bias", False)):
            value = getattr(m, name)
            _require(value == plain, f"model.{name}={value}: with model.mla it must be {plain}")
    _require(
        m.global_every == 0 or m.sliding_window is not None,
        f"model.global_every={m.global_every} needs model.sliding_window for the other layers",
    )
    _check_rope(m.rope, m.rotary_width)


def _check_rope(rope: RopeConfig, width: int) -> None:
    _require(
        rope.scaling != "none" or rope.factor == 1,
        f"model.rope.factor={rope.factor} needs model.rope.scaling: linear, ntk, yarn or llama3",
    )
    _require(
        rope.scaling != "ntk" or width > 2,
        f"model.rope.scaling=ntk needs more than the {width} rotary dims of a head",
    )
    low, high = rope.low_freq_factor, rope.high_freq_factor
    _require(
        rope.scaling != "llama3" or low < high,
        f"model.rope.low_freq_factor={low} must be less than model.rope.high_freq_factor={high}",
    )


def _check_experts(m: ModelConfig) -> None:
    e, r = m.n_experts, m.router
    _require(m.top_k <= e, f"model.top_k={m.top_k} is more than model.n_experts={e}")
    _require(
        m.first_dense < m.n_layers or m.is_dense,
        f"model.first_dense={m.first_dense} leaves none of model.n_layers={m.n_layers} experts;"
        " a dense model has model.n_experts=1",
    )
    _require(
        m.first_dense + m.moe_every <= m.n_layers or m.is_dense,
        f"model.moe_every={m.moe_every} is more than the layers after model.first_dense="
        f"{m.first_dense} of model.n_layers={m.n_layers}, so that none has experts",
    )
    _require(
        m.expert_path != "batched" or m.expert_exchange in ("auto", "all_to_all"),
        f"model.expert_exchange={m.expert_exchange} does not give model.expert_path=batched its"
        " equal slots; set it to all_to_all",
    )
    _require(
        m.expert_path != "kernel" or m.matmul == "plain",
        f"model.matmul={m.matmul} is not built for model.expert_path=kernel; set that to batched",
    )
    _divides("model.router.n_groups", r.n_groups, "model.n_experts", e)
    _require(
        r.top_k_groups <= r.n_groups,
        f"model.router.top_k_groups={r.top_k_groups} is more than"
        f" model.router.n_groups={r.n_groups}",
    )
    size = e // r.n_groups
    _require(
        r.n_groups == 1 or size >= 2,
        f"model.router.n_groups={r.n_groups} leaves {size} expert a group: it needs two",
    )
    _require(
        m.top_k <= r.top_k_groups * size,
        f"model.top_k={m.top_k} is more than the {r.top_k_groups * size} experts of"
        f" model.router.top_k_groups={r.top_k_groups} groups",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _divides(small_name: str, small: int, big_name: str, big: int) -> None:
    _require(big % small == 0, f"{small_name}={small} does not divide {big_name}={big}")
