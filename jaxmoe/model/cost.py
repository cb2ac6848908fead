"""What the model costs, counted from its Specs."""

from dataclasses import dataclass

from jaxmoe import tree
from jaxmoe.config import ModelConfig
from jaxmoe.model.lm import lm_specs
from jaxmoe.model.stack import kinds
from jaxmoe.spec import is_spec

GROUPS = ("embed", "attention", "dense", "experts", "shared", "router", "norm", "mtp", "head")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts of a model at a sequence length. All are Python ints, hence exact.

    Attributes:
        params: all parameters.
        params_main: those without the multi-token-prediction modules.
        params_active: those of the main model that a token passes through: `top_k` of its experts,
            and not the embedding's rows, which are looked up; but a tied embedding is multiplied,
            as the head.
        groups: parameters by group; they add up to `params`. `dense` is the feed-forward of layers
            without experts, `mtp` all of the multi-token-prediction modules; biases and sinks are
            with what they are added to; `head` is 0 where it is tied.
        flops_per_sequence: model FLOPs of a training step (forward and backward) for one sequence
            of one document: 6 a token x active parameters, of the main model and of each MTP
            module, which goes through the head once more; and attention's scores and sums over
            the positions that a causal mask and the layer's window leave. Recomputation is not
            counted (PaLM, arXiv:2204.02311, appendix B, which has attention over all positions).
        flops_per_token: its mean over the sequence, rounded down to a whole one.
    """

    params: int
    params_main: int
    params_active: int
    groups: dict[str, int]
    flops_per_sequence: int
    flops_per_token: int


def cost(cfg: ModelConfig, seq_len: int) -> Cost:
    groups: dict[str, int] = {group: 0 for group in GROUPS}
    mtp_experts = 0
    for name, spec in tree.named_leaves(lm_specs(cfg), is_leaf=is_spec):
        groups[_group(name)] += spec.size
        mtp_experts += spec.size if "/experts/" in name and name.startswith("mtp/") else 0
    params = sum(groups.values())
    main, head = params - groups["mtp"], cfg.d_model * cfg.vocab_size
    looked_up = 0 if cfg.tie_embeddings else groups["embed"]
    active = main - looked_up - _idle(groups["experts"], cfg)
    active_mtp = groups["mtp"] - _idle(mtp_experts, cfg) + cfg.n_mtp * head
    flops = 6 * (active + active_mtp) * seq_len + _attention_flops(cfg, seq_len)
    return Cost(
        params=params,
        params_main=main,
        params_active=active,
        groups=groups,
        flops_per_sequence=flops,
        flops_per_token=flops // seq_len,
    )


def _group(name: str) -> str:
    """By the parts of a parameter's path; a norm anywhere in the main model is one."""
    *parents, leaf = name.split("/")
    if parents[:1] == ["mtp"]:
        return "mtp"
    if "norm" in leaf:
        return "norm"
    for group in ("experts", "shared", "router", "attention"):
        if group in parents:
            return group
    return "dense" if "ffn" in parents else {"embed_VD": "embed", "head_DV": "head"}[leaf]


def _idle(experts: int, cfg: ModelConfig) -> int:
    """Of the experts' parameters, those that a token does not go through."""
    return experts // cfg.n_experts * (cfg.n_experts - cfg.top_k)


def _attention_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Of one sequence: each visible pair of positions is a product of a query and a key, and a
    value added, 2 FLOPs an element; the backward pass is twice the forward one."""
    widths = 2 * cfg.d_head
    if cfg.mla is not None:
        widths = cfg.mla.d_nope + cfg.mla.d_rope + cfg.mla.d_value
    # A module of multi-token prediction is a layer with a window, where there are windows (lm.py).
    windows = [kind.window for kind in kinds(cfg)] + [cfg.sliding_window] * cfg.n_mtp
    pairs = sum(_visible(seq_len, window) for window in windows)
    return 3 * 2 * cfg.n_heads * widths * pairs


def _visible(seq_len: int, window: int | None) -> int:
    """Pairs of a position and one that it sees: itself and those before it, within the window."""
    w = seq_len if window is None else min(window, seq_len)
    return w * (w + 1) // 2 + (seq_len - w) * w
