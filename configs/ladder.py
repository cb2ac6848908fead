"""One dial: a family of models and runs, each a function of its rung (docs/ladder.md).

    python configs/ladder.py            the table of the rungs and the targets

Rung k has width 16 + 4 k and a layer more every 36 rungs. All else follows: heads and experts keep
their ratio to the width, tokens to the active parameters, the batch to the root of the tokens; the
rates are those of the base rung, carried over by jaxmoe/transfer.py. A family is a function of the
rung, so write your own beside this one.
"""

from collections.abc import Mapping, Sequence

from jaxmoe import transfer
from jaxmoe.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ForecastConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    replace,
)
from jaxmoe.forecast.rate_law import PowerLaw
from jaxmoe.model.cost import Cost, cost

# Set aside before anything is read. Of the standard library: files that open with one long licence,
# as those of flax do, are half learnt once that is, which is a step in the loss, not a slope.
HELD_OUT = ("email", "http", "json", "logging", "urllib")
BASE = 4  # the rung that rates were tuned on
TARGET = 32
TOKENS_PER_PARAMETER = (
    80  # bytes: 20 tokens of 4 bytes (Hoffmann et al., arXiv:2203.15556, table 3)
)
SEQ_LEN = 256
BATCH = 3.0  # sequences of the base rung's step
# Best of the sweep at the base rung (benchmarks/transfer.py), and shares of the run.
RATES = {"adamw": 1e-2, "muon": 2e-2}
TIMESCALE = 0.5  # of the weights' mean, in runs (transfer.weight_decay)
WARMUP, DECAY = 0.05, 0.2


def rung(
    k: int,
    *,
    experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    horizon: float = 1.0,
    optim: str = "adamw",
    laws: Mapping[str, PowerLaw] | None = None,
) -> Config:
    """The run of rung k = 0, 1, 2, ...

    Args:
        experts: 1 is the dense family, of the same active parameters but for the router.
        horizon: times the tokens of the rung; warm-up and peak stay, the rate falls at its end.
        laws: of "lr" and "batch" (tokens of a step) over training tokens, fitted from a sweep
            (forecast/rate_law.py); None: lr is that of the base rung, batch the root of the tokens.
    """
    model = _shape(k, experts, top_k)
    base = _shape(BASE, experts, top_k)
    model = replace(model, transfer=transfer.tuned_at(base))
    tokens, whole = _tokens(model), _tokens(base)
    laws = laws or {}
    sequences = BATCH * (tokens / whole) ** 0.5
    if "batch" in laws:
        sequences = laws["batch"](tokens) / SEQ_LEN
    batch = max(1, round(sequences))
    plain = tokens / (batch * SEQ_LEN)  # steps of horizon 1
    steps = max(10, round(plain * horizon))
    # Whole sequences are up to a fifth off the rule: the rate makes up for it (arXiv:2205.10287).
    lr = (laws["lr"](tokens) if "lr" in laws else RATES[optim]) * (batch / sequences) ** 0.5
    every = max(1, steps // 25)
    kind = "dense" if experts == 1 else f"moe{experts}"
    return Config(
        name=f"ladder-{kind}-{k}",
        seed=seed,
        model=model,
        # 130 kB held out: every evaluation of rung 0 costs a fifth of its training.
        data=DataConfig(
            holdout=HELD_OUT, tokenizer="bytes", max_bytes=64_000_000, holdout_bytes=130_000
        ),
        optim=OptimConfig(
            name=optim,  # type: ignore[arg-type]
            lr=lr,
            warmup_steps=max(1, round(WARMUP * plain)),
            decay_fraction=DECAY,
            weight_decay=transfer.weight_decay(lr, steps, TIMESCALE),
        ),
        train=TrainConfig(steps=steps, batch_size=batch, seq_len=SEQ_LEN),
        eval=EvalConfig(every=every, batch_size=32),
        checkpoint=CheckpointConfig(every=every * 10),
        forecast=ForecastConfig(first=every * 10, every=every * 2),
    )


def moe(k: int = 0) -> Config:
    """Eight experts, top-2."""
    return rung(k)


def dense(k: int = 0) -> Config:
    return rung(k, experts=1)


def muon(k: int = 0) -> Config:
    """Eight experts, top-2, by Muon: a change for the gate."""
    return rung(k, optim="muon")


def ladder() -> Config:
    """The first rung, what `--config configs/ladder.py` is."""
    return replace(rung(0), name="ladder")


def target_moe() -> Config:
    return _target("target_moe", experts=8)


def target_dense() -> Config:
    return _target("target_dense", experts=1)


def target_muon() -> Config:
    return _target("target_muon", experts=8, optim="muon")


def _target(name: str, experts: int, optim: str = "adamw") -> Config:
    """An hour of two cores, so it is saved more often than a rung."""
    config = rung(TARGET, experts=experts, optim=optim)
    saved = replace(config.checkpoint, every=config.eval.every * 2)
    return replace(config, name=name, checkpoint=saved)


def _shape(k: int, experts: int, top_k: int) -> ModelConfig:
    """Two experts together are as wide as the feed-forward of the dense model: three times the
    width, and a layer has 13 width^2 active parameters."""
    width = 16 + 4 * k
    is_dense = experts == 1
    return ModelConfig(
        vocab_size=264,  # 256 bytes and the end of a text, in whole vectors
        d_model=width,
        n_layers=2 + k // 36,
        n_heads=2,
        n_kv_heads=2,
        d_head=width // 2,
        d_ff=3 * width if is_dense else 3 * width // top_k,
        n_experts=experts,
        top_k=1 if is_dense else top_k,
        remat="none",
    )


def _tokens(model: ModelConfig) -> int:
    return TOKENS_PER_PARAMETER * cost(model, SEQ_LEN).params_active


def row(config: Config) -> dict[str, float]:
    """What a rung is and costs; FLOPs as model/cost.py counts them."""
    m, t = config.model, config.train
    counted: Cost = cost(m, t.seq_len)
    tokens = t.steps * config.tokens_per_step
    return {
        "width": m.d_model,
        "depth": m.n_layers,
        "params": counted.params,
        "active": counted.params_active,
        "tokens": tokens,
        "flops": tokens * counted.flops_per_token,
        "steps": t.steps,
        "batch": config.tokens_per_step,
        "warmup": config.optim.warmup_steps,
        "lr": config.optim.lr,
        "decay": config.optim.weight_decay,
    }


def table(experts: int, ks: Sequence[int]) -> str:
    """A line a rung, with its share of the target's compute."""
    whole = row(rung(TARGET, experts=experts))["flops"]
    lines = [
        "rung  width depth   params   active   tokens    FLOPs  of target  steps  batch warm-up"
        "       lr  decay"
    ]
    for k in ks:
        r = row(rung(k, experts=experts))
        lines.append(
            f"{k:4}  {r['width']:5} {r['depth']:5} {r['params'] / 1e3:7,.0f}k"
            f" {r['active'] / 1e3:7,.0f}k {r['tokens'] / 1e6:7.2f}M {r['flops']:8.2e}"
            f"  1/{whole / r['flops']:<8,.0f} {r['steps']:5} {r['batch']:6} {r['warmup']:7}"
            f" {r['lr']:8.2e} {r['decay']:6.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    for experts in (1, 8):
        print("dense" if experts == 1 else f"{experts} experts, top-2")
        print(table(experts, (*range(8), TARGET)), "\n")


if __name__ == "__main__":
    main()
