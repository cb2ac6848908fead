"""Which attention path a call takes, and why not another one: the rules, in one place, without JAX.

chunked  plain matmuls on any backend (kernels/attention.py, online.py; ring.py on mesh.context)
cudnn    cuDNN's flash attention (NVIDIA GPUs)
splash   the Pallas kernel that JAX ships for TPUs
"""

from dataclasses import dataclass
from typing import Any

from jaxmoe.errors import UserError

FUSED = ("cudnn", "splash")  # what `auto` prefers where nothing is in the way
NEEDS = {"cudnn": "gpu", "splash": "tpu"}
# cuDNN's widest heads, on GPUs from compute capability 9.0 (Hopper) on and before
# (jax 0.10.2 - 0.12, _src/cudnn/fused_attention_stablehlo.py, check_is_flash_attention).
WIDEST, WIDEST_BEFORE_HOPPER = 256, 128


@dataclass(frozen=True, kw_only=True)
class Call:
    """What decides. Windows, lengths and numbers of heads are served by every path.

    Attributes:
        platform: "cpu", "gpu" (NVIDIA's), "tpu" or another; None: not known yet.
        dtype: of queries, keys and values.
        width: of a head, the wider of keys and values (the narrower is padded).
        context: the sequence is sharded.
        hopper: the GPU is one, or newer.
    """

    platform: str | None
    dtype: str
    width: int
    soft_cap: bool = False
    sinks: bool = False
    documents: bool = False
    context: bool = False
    hopper: bool = True


def obstacle(path: str, call: Call) -> str | None:
    """Why `call` cannot take `path`; None if it can."""
    needs = NEEDS.get(path)
    if needs is not None and call.platform not in (None, needs):
        return f"it needs a {needs.upper()}, and this is {call.platform}"
    if path in FUSED and call.context:
        return "it knows whole sequences only, and mesh.context shards them"
    return _obstacle_of_cudnn(call) if path == "cudnn" else None


def _obstacle_of_cudnn(call: Call) -> str | None:
    if call.dtype != "bfloat16":
        return f"cuDNN computes in bfloat16, not in model.dtype={call.dtype}"
    if call.soft_cap:
        return "cuDNN has no model.attention_soft_cap"
    if call.sinks:
        return "cuDNN's backward pass knows nothing of model.attention_sinks"
    if call.documents:
        # Its masks are arrays of [L, L]; its packed layout wants the number of documents at
        # compile time, and a log-sum-exp of [B * that number, N, L].
        return "cuDNN masks documents (data.document_mask) only at a memory of length squared"
    widest = WIDEST if call.hopper else WIDEST_BEFORE_HOPPER
    if call.width > widest:
        which = "" if call.hopper else " before Hopper"
        return f"cuDNN's heads are at most {widest} wide{which}, and these are {call.width}"
    return None


def pick(wish: str, call: Call) -> str:
    """The path of a call; `wish` is `model.attention_path`.

    Raises:
        UserError: it is another than "auto" and cannot be had; the message says why.
    """
    if wish == "auto":
        # Off GPU and TPU, and where the platform is not known, nothing fused is taken for granted.
        able = [path for path in FUSED if call.platform and obstacle(path, call) is None]
        return able[0] if able else "chunked"
    reason = obstacle(wish, call)
    if reason is not None:
        raise UserError(f"model.attention_path={wish}: {reason}; set it to auto or chunked")
    return wish


def check(model: Any, documents: bool, context: bool = False) -> None:
    """What a ModelConfig rules out wherever it runs; the platform is known when it is traced.

    Raises:
        UserError: as `pick`.
    """
    mla = model.mla
    call = Call(
        platform=None,
        dtype=model.dtype,
        width=model.d_head if mla is None else max(mla.d_nope + mla.d_rope, mla.d_value),
        soft_cap=model.attention_soft_cap is not None,
        sinks=model.attention_sinks,
        documents=documents,
        context=context,
    )
    pick(model.attention_path, call)
