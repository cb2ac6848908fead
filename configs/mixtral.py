"""Mixtral 8x7B (Jiang et al., arXiv:2401.04088)."""

from jaxmoe.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ForecastConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
)


def mixtral() -> Config:
    """46.7 billion parameters, 12.9 active with the embedding (Mistral AI's announcement).

    The shape is table 1's and that of the released mistralai/Mixtral-8x7B-v0.1. How it was trained
    is not public but for the context of 32k tokens (section 1); rates and tokens are ours.
    """
    return Config(
        name="mixtral",
        model=ModelConfig(
            vocab_size=32_000,
            d_model=4096,
            n_layers=32,
            norm_eps=1e-5,
            n_heads=32,
            n_kv_heads=8,
            d_head=128,
            rope=RopeConfig(theta=1e6),
            qk_norm="none",
            d_ff=14_336,
            n_experts=8,
            top_k=2,
            # Softmax over the chosen two (section 2.1) is that over all, normalised again. The
            # released coefficient is of a mean over layers that is top_k where loads are even;
            # ours is of a sum over layers of what is one there.
            router=RouterConfig(load_balance_coef=0.02 * 2 / 32, z_coef=0.0),
            z_loss_coef=0.0,
            loss_chunk=256,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", final_lr=0.1),
        # 4.2 million tokens a step, 2 trillion in all.
        train=TrainConfig(steps=476_800, batch_size=128, seq_len=32_768),
        eval=EvalConfig(every=1000, batch_size=128),
        checkpoint=CheckpointConfig(every=1000),
        forecast=ForecastConfig(first=50_000, every=5000),
    )
