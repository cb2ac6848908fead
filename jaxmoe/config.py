"""The config tree: frozen, keyword-only dataclasses, strict on load, JSON both ways, fingerprinted.

A config file is Python with functions that return a `Config`; a variant is `replace` of a parent.
Values are validated by pydantic (types, ranges, unknown keys); rules between fields are in
config_check.py.
Configs are hashable and are passed to jitted functions as static arguments.
"""

import ast
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError

from jaxmoe.config_file import call, import_file
from jaxmoe.config_run import (
    CheckpointConfig,
    EvalConfig,
    FaultConfig,
    ForecastConfig,
    GuardConfig,
    HealthConfig,
    LogConfig,
    MeshConfig,
)
from jaxmoe.config_types import LATER, Fraction, Natural, NonNegative, Positive, Strict
from jaxmoe.errors import UserError
from jaxmoe.outside import json_object, reading

__all__ = ["Config", "apply_sets", "diff", "fingerprint", "from_json", "load", "replace"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Strict):
    """Rotary positions, and how their frequencies change beyond the length they were trained on."""

    theta: Annotated[float, Field(gt=0)] = 10_000.0
    # linear: positions over factor. ntk: theta grown. yarn: arXiv:2309.00071. llama3: Llama 3.1.
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    factor: Annotated[float, Field(ge=1)] = 1.0  # longest length over original_length
    original_length: Positive = 8192  # positions trained on before scaling
    beta_fast: float = 32.0  # yarn: pairs that turn more often than this keep their frequency
    beta_slow: float = 1.0  # yarn: those that turn less often are fully interpolated
    truncate: bool = True  # yarn: the two bounds are rounded to whole pairs
    attention_factor: float | None = None  # yarn: of cos and sin; None: from factor and mscale
    mscale: float | None = None  # yarn as DeepSeek has it
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True, kw_only=True)
class MlaConfig(Strict):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    q_rank: Natural = 0  # Q, of the queries' latent; 0: queries come from the input directly
    kv_rank: Positive  # J, of the latent that keys and values come from
    d_nope: Positive  # I, of a head's query and key without position
    d_rope: Positive  # W, rotary part; the key's is one for all heads
    d_value: Positive  # U


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Strict):
    """Which experts a token goes to, and how they are kept evenly loaded."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    norm_top_k: bool = True  # the chosen experts' weights add up to one
    scale: Annotated[float, Field(gt=0)] = 1.0  # of the weights
    n_groups: Positive = 1  # of experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)
    top_k_groups: Positive = 1  # groups a token may choose from, by the sum of their two best
    bias: bool = False  # a trained bias on the logits
    jitter: Fraction = 0.0  # its input times uniform(1 - jitter, 1 + jitter), in training only
    load_balance_coef: NonNegative = 0.01  # Switch Transformer, section 2.2, eq. 4
    # What the auxiliary loss averages loads over; microbatch: the sequences of one device, or of
    # those that share them over mesh.context, in one microbatch of a pipeline. With
    # train.accumulate = n only "sequence" is the big batch's loss: "global" then means the rows of
    # one of the n parts, "microbatch" those of one device in one part; parts weigh by their tokens.
    load_balance_scope: Literal["sequence", "microbatch", "global"] = "global"
    # Step of the bias that evens loads out without a loss (arXiv:2408.15664); None: there is none,
    # 0: it is used as it is.
    balance_bias_rate: NonNegative | None = None
    z_coef: NonNegative = 0.001  # ST-MoE, section 3.2, eq. 5


@dataclass(frozen=True, kw_only=True)
class TransferConfig(Strict):
    """The shape that rates were tuned on, from which they are carried over (jaxmoe/transfer.py).
    What is not here is the same in both."""

    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    n_kv_heads: Positive
    d_head: Positive
    d_ff: Positive
    d_ff_dense: Natural = 0
    mla: MlaConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Strict):
    """Shape of the decoder. Letters are the dims' suffixes in tensor names."""

    vocab_size: Positive = 4096  # V
    d_model: Positive = 128  # D
    n_layers: Positive = 4
    tie_embeddings: bool = False
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6

    # Attention: n_kv_heads = n_heads is multi-head, 1 multi-query, between them grouped-query
    n_heads: Positive = 4  # N
    n_kv_heads: Positive = 2  # K
    d_head: Positive = 32  # H
    mla: MlaConfig | None = None  # instead of n_kv_heads and d_head
    rope: RopeConfig = field(default_factory=RopeConfig)
    qk_norm: Literal["none", "per_head", "full"] = "per_head"  # full: over all heads at once
    attention_bias: bool = False  # on queries, keys, values and output
    attention_sinks: bool = False  # a learnt logit a head that takes weight and gives nothing
    attention_soft_cap: Annotated[float, Field(gt=0)] | None = None  # cap * tanh(score / cap)
    sliding_window: Positive | None = None  # positions seen, itself included
    global_every: Natural = 0  # every so many layers one sees all positions; 0: none does
    # auto: the first of cudnn and splash that can do it, or chunked (attention_paths.py).
    attention_path: Literal["auto", "chunked", "cudnn", "splash"] = "auto"
    # Where mesh.context shards the sequence: keys and values travel around its devices (ring), or
    # all come to each (gather); auto: gather where they are few (kernels/ring.py).
    context_attention: Literal["auto", "ring", "gather"] = "auto"

    # Feed-forward: n_experts = 1 is a dense model
    d_ff: Positive = 128  # F, of one expert
    n_experts: Positive = 8  # E
    top_k: Positive = 2
    n_shared_experts: Natural = 0  # of width d_ff, for every token
    first_dense: Natural = 0  # leading layers without experts
    moe_every: Positive = 1  # after those, every so many layers the last one has experts
    d_ff_dense: Natural = 0  # F of layers without experts; 0: d_ff
    activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
    swiglu_limit: Annotated[float, Field(gt=0)] = 7.0  # clamped_swiglu
    swiglu_alpha: Annotated[float, Field(gt=0)] = 1.702  # clamped_swiglu
    expert_bias: bool = False
    # blocked: loops over blocks of rows (model/blocked.py); kernel: grouped matmuls in Pallas
    # (model/sorted_experts.py); batched: equal slots for all experts (model/moe.py); auto: blocked
    # on CPU, kernel on GPU and TPU, batched there with matmul=float8.
    expert_path: Literal["auto", "blocked", "kernel", "batched"] = "auto"
    # How rows reach the devices of their experts (kernels/exchange.py); auto: the way that moves
    # fewer rows, of all_to_all and all_gather.
    expert_exchange: Literal["auto", "all_to_all", "all_gather", "ragged"] = "auto"
    router: RouterConfig = field(default_factory=RouterConfig)
    # None: rates and scales are this model's own, whatever its size.
    transfer: TransferConfig | None = None

    # Loss
    logit_soft_cap: Annotated[float, Field(gt=0)] | None = None
    z_loss_coef: NonNegative = 0.0001  # PaLM, section 5
    n_mtp: Natural = 0  # further tokens predicted (DeepSeek-V3, section 2.2)
    mtp_coef: NonNegative = 0.3  # of their mean loss
    loss_chunk: Positive = 64  # positions of a sequence on a device whose logits live at one time

    dtype: Literal["float32", "bfloat16"] = "float32"  # of compute; parameters rest in float32
    # Operands of the layers' matmuls with weights (kernels/low_precision.py).
    matmul: Literal["plain", "float8"] = "plain"
    # What is kept for the backward pass, from most to least on the device (model/remat.py).
    remat: Literal["none", "matmuls", "attention", "full", "offload"] = "full"

    @property
    def is_dense(self) -> bool:
        """One expert needs no router."""
        return self.n_experts == 1

    @property
    def rotary_width(self) -> int:
        """Of a head: the dims that turn with the position."""
        return self.d_head if self.mla is None else self.mla.d_rope


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Strict):
    """One source of the mix, by its name in the data set."""

    name: str
    weight: Annotated[float, Field(gt=0)] = 1.0  # its share of the tokens, over the sum of weights
    epochs: Annotated[float, Field(gt=0)] | None = None  # how often it is read at most
    # Fill in the middle (Bavarian et al., arXiv:2207.14255): the share of documents that are turned
    # around, and of these the share that begins with the suffix (SPM), the others with the prefix.
    fim_rate: Fraction = 0.0
    fim_spm: Fraction = 0.5


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(Strict):
    """Other weights, from the first step on before which so many tokens are consumed."""

    tokens: Positive
    weights: tuple[tuple[str, NonNegative], ...]  # (name, weight); sources not named rest


@dataclass(frozen=True, kw_only=True)
class DataConfig(Strict):
    """Where text comes from, what is held out, and how it becomes tokens."""

    # A folder of text files, or a data set, which may be a URL (gs, s3, http, https, file); None:
    # what this Python installation has.
    path: str | None = None
    holdout: tuple[str, ...] = ()  # packages never trained on; (): a share of them, by hash
    # bpe: learnt from this text, of model.vocab_size ids; bytes; default: ours of 32,768 ids; or a
    # file: tokenizer.json, *.tiktoken, a sentencepiece *.model.
    tokenizer: Annotated[str, Field(min_length=1)] = "bpe"
    tokenizer_bytes: Positive = 6_000_000  # text that the BPE merges are learnt from
    max_bytes: Positive = 32_000_000  # of training text, whole documents chosen by hash
    holdout_bytes: Positive = 400_000  # of held-out text, likewise
    document_mask: bool = False  # attention stays in the document, positions restart in each
    sources: tuple[SourceConfig, ...] = ()  # (): all of the data set, by their size
    phases: tuple[PhaseConfig, ...] = ()
    # split: the row of tokens is cut where a sequence ends. best_fit: documents stay whole where
    # they fit (data/packing.py); neither pads.
    packing: Literal["split", "best_fit"] = "split"
    # A source that a run would read more often than its epochs: the run is refused, or the source
    # stops there and the others share its weight.
    on_cap: Literal["refuse", "redistribute"] = "refuse"
    cache: str | None = None  # None: $JAXMOE_CACHE, or ~/.cache/jaxmoe
    # What to do when a shard of a data set is not as it was written (its SHA-256 is compared at the
    # first read): stop, or leave out its tokens; an event says which.
    damaged: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Strict):
    # muon: for matrices, with Adam for the rest. adafactor (arXiv:1804.04235): factored second
    # moments and no first one; beta1, beta2 and eps are its own.
    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    # How Adam's and Muon's moments are kept (jaxmoe/moments.py): 8, 4 or about 2 bytes a parameter
    # with adamw. int8: blockwise after arXiv:2110.02861, of matrices; the rest stays float32.
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    # Each replica keeps and updates its part of the optimiser's state: gradients are
    # reduce-scattered over `replica`, updates gathered (ZeRO stage 1, arXiv:1910.02054, section 5;
    # with train.accumulate stage 2: the sums of gradients are spread too).
    shard_over_replica: bool = False
    lr: Annotated[float, Field(gt=1e-37)] = 3e-3  # peak; float32 has nothing smaller
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0  # of the global gradient norm
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    # How the rate follows train.batch_ramp: times the tokens of a step over those of the run's
    # largest, to the power of 0, 1/2 (Malladi et al., arXiv:2205.10287) or 1. lr is the largest's.
    batch_rule: Literal["none", "sqrt", "linear"] = "none"
    warmup_steps: Natural = 50
    decay_fraction: Fraction = 0.2  # of all steps, at the end (wsd)
    final_lr: Fraction = 0.0  # of the peak, at the last step


@dataclass(frozen=True, kw_only=True)
class BatchStage(Strict):
    """From the first step on before which `tokens` are consumed."""

    tokens: Positive
    batch_size: Positive  # sequences of train.seq_len, over all devices
    accumulate: Positive = 1


@dataclass(frozen=True, kw_only=True)
class LengthStage(Strict):
    """From the first step on before which `tokens` are consumed; 0: from the start."""

    tokens: Natural
    seq_len: Positive


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Strict):
    steps: Positive = 1000
    batch_size: Positive = 8  # sequences, over all devices
    # Parts that a step's batch is computed in, one after another: activations of one part live at
    # one time. Divides batch_size; gradients are summed, in float32, and divided once.
    accumulate: Positive = 1
    seq_len: Positive = 256  # tokens; also of held-out sequences
    batch_ramp: tuple[BatchStage, ...] = ()
    # Other lengths of training sequences; a batch keeps its tokens, so that seq_len * batch_size
    # must divide by each.
    length_ramp: tuple[LengthStage, ...] = ()
    log_every: Positive = 10  # steps


@dataclass(frozen=True, kw_only=True)
class Config(Strict):
    """Everything that decides a run."""

    name: str = "unnamed"
    seed: Natural = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    guard: GuardConfig = field(default_factory=GuardConfig, metadata=LATER)
    health: HealthConfig = field(default_factory=HealthConfig, metadata=LATER)
    log: LogConfig = field(default_factory=LogConfig, metadata=LATER)
    faults: tuple[FaultConfig, ...] = field(default=(), metadata=LATER)

    @property
    def tokens_per_step(self) -> int:
        """Before any ramp (curriculum.py has those of each step)."""
        return self.train.batch_size * self.train.seq_len


def load(spec: str) -> Config:
    """`FILE[:FUNCTION]` -> Config. Without a function the one named like the file is called.

    FILE may also be a run's config.json.

    Raises:
        UserError: no such file or function, or the function does not return a Config.
    """
    file, _, function = spec.partition(":")
    path = Path(file)
    with reading(f"--config {file}", "configs/ has some to start from"):
        there = path.is_file()
    if not there:
        raise UserError(f"--config {file}: no such file; configs/ has some to start from")
    if path.suffix == ".json":
        return _load_json(path)
    function = function or path.stem
    module = import_file(path)
    build = getattr(module, function, None)
    if not callable(build):
        near = _nearest(function, [n for n in vars(module) if not n.startswith("_")])
        raise UserError(f"--config {file}: it has no function {function!r}{near}")
    config = call(build, f"--config {file}: {function}()")
    if not isinstance(config, Config):
        raise UserError(
            f"--config {spec}: {function}() returned {type(config).__name__}, not Config"
        )
    return config


def _load_json(path: Path) -> Config:
    tree = json_object(path, "it is not a run's config")
    try:
        return from_json(json.dumps(tree.get("config", tree)))
    except (UserError, RecursionError) as error:
        raise UserError(f"--config {path}: {error}") from None


def apply_sets(config: Config, sets: Sequence[str]) -> Config:
    """Applies `a.b=v` overrides in order. `v` is a Python literal, or else a plain string."""
    tree = dataclasses.asdict(config)
    for item in sets:
        key, eq, text = item.partition("=")
        if not eq:
            raise UserError(f"--set {item}: write it as KEY=VALUE, for example train.steps=100")
        node, *path = tree, *key.strip().split(".")
        for part in path[:-1]:
            node = _child(node, part, key)
        _child(node, path[-1], key)
        if isinstance(node[path[-1]], dict):
            raise UserError(
                f"--set {item}: {key} is a group; set one of {', '.join(node[path[-1]])}"
            )
        word = text.strip()
        node[path[-1]] = word if word in _choices(key) else _literal(word)
    return from_json(json.dumps(tree))


def from_json(text: str) -> Config:
    """Validates JSON text against the tree; the error for an unknown key names the nearest."""
    try:
        return TypeAdapter(Config).validate_json(text)
    except ValidationError as error:
        raise UserError("; ".join(map(_explain, error.errors()))) from None


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The `model` part alone, checked like the whole."""
    return from_json(json.dumps({"model": values})).model


def as_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values: what `from_json` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def counted(config: Any) -> dict[str, Any]:
    """JSON values of a config (or a part) without `LATER` fields that say nothing of their own: so
    fingerprints and recipes of before a field was there are those of after."""
    tree = as_dict(config)
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if "later" in one.metadata and value == _default(one):
            del tree[one.name]
        elif dataclasses.is_dataclass(value):
            tree[one.name] = counted(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            tree[one.name] = [counted(each) for each in value]
    return tree


def _default(one: dataclasses.Field[Any]) -> Any:
    if one.default_factory is not dataclasses.MISSING:
        return one.default_factory()
    return one.default


def fingerprint(config: Any) -> str:
    """12 hex digits of the SHA-256 of a config's (or a part's) canonical JSON, as `counted`."""
    canonical = json.dumps(counted(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def diff(a: Config, b: Config) -> list[str]:
    """`key: value in a -> value in b` for every leaf that differs."""
    left, right = dict(leaves(dataclasses.asdict(a))), dict(leaves(dataclasses.asdict(b)))
    # A part that is None on one side has no leaves there.
    keys = [*left, *(k for k in right if k not in left)]
    pairs = [(k, left.get(k), right.get(k)) for k in keys]
    return [f"{k}: {x!r} -> {y!r}" for k, x, y in pairs if x != y]


def _literal(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        value = ast.literal_eval(text)
        json.dumps(value)  # bytes, sets and complex numbers are literals too, and no config's
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value


def _choices(key: str) -> tuple[Any, ...]:
    """The words a field may be, of which "none" is one for some; () for other fields."""
    found: Any = Config
    for part in key.strip().split("."):
        if not dataclasses.is_dataclass(found):
            return ()
        found = {f.name: f.type for f in dataclasses.fields(found)}.get(part)
    return get_args(found) if get_origin(found) is Literal else ()


def _child(node: Any, part: str, key: str) -> Any:
    if not isinstance(node, dict) or part not in node:
        options = list(node) if isinstance(node, dict) else []
        raise UserError(f"unknown config key {key!r}{_nearest(part, options)}")
    return node[part]


def _nearest(word: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(repr, options))}" if options else ""


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown config key {key!r}{_nearest(path[-1], _names_at(path[:-1]))}"
    return f"{key}={error['input']!r}: {error['msg']}"


def _names_at(path: Sequence[str]) -> list[str]:
    """Of the fields of a group, also of one in a tuple (faults.0) or one that may be None."""
    found: Any = Config
    for part in path:
        if not part.isdecimal():
            found = {f.name: f.type for f in dataclasses.fields(found)}[part]
        found = next((t for t in (found, *get_args(found)) if dataclasses.is_dataclass(t)), found)
    return [f.name for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what `as_dict` gives."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
