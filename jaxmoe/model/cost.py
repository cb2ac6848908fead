"""What the model costs, counted from its Specs."""

from dataclasses import dataclass
from typing import Any

from jaxmoe import tree
from jaxmoe.config import ModelConfig
from jaxmoe.model.lm import lm_specs
from jaxmoe.spec import is_spec


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts of a model at a sequence length.

    Attributes:
        params: all parameters.
        params_active: those a token passes through, without the embedding's rows.
        groups: parameters by group; they add up to `params`.
        flops_per_token: model FLOPs of a training step (forward and backward) per token:
            6 x active non-embedding parameters + attention's scores and sums over the
            positions a causal mask leaves. Recomputation is not counted (PaLM, appendix B).
    """

    params: int
    params_active: int
    groups: dict[str, int]
    flops_per_token: int


def cost(cfg: ModelConfig, seq_len: int) -> Cost:
    groups = {"embed": 0, "attention": 0, "experts": 0, "router": 0, "norm": 0, "head": 0}
    for name, spec in tree.named_leaves(lm_specs(cfg), is_leaf=is_spec):
        groups[_group(name, spec)] += spec.size
    params = sum(groups.values())
    experts_active = groups["experts"] * cfg.top_k // cfg.n_experts
    active = params - groups["embed"] - groups["experts"] + experts_active
    # Scores and sums: 2 matmuls x 2 FLOPs x 3 passes, over (L + 1) / 2 visible positions.
    attention = 6 * cfg.n_layers * cfg.n_heads * cfg.d_head * (seq_len + 1)
    return Cost(
        params=params,
        params_active=active,
        groups=groups,
        flops_per_token=6 * active + attention,
    )


def _group(name: str, spec: Any) -> str:
    if "norm" in spec.axes:
        return "norm"
    if "experts" in spec.axes:
        return "experts"
    if "router" in spec.axes:
        return "router"
    if "vocab" in spec.axes:
        return "embed" if name.startswith("embed") else "head"
    return "attention"
