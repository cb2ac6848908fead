"""Qwen3-8B and Qwen3-0.6B (Qwen Team, arXiv:2505.09388): dense models."""

from jaxmoe.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ForecastConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    TrainConfig,
    replace,
)


def qwen3() -> Config:
    """Qwen3-8B: 8.19 billion parameters.

    The shape is table 1's and that of the released Qwen/Qwen3-8B. Context and tokens are of the
    first two stages (section 3.2), in which theta was 10,000; rates and batch are not public, these
    are ours.
    """
    return Config(
        name="qwen3",
        model=ModelConfig(
            vocab_size=151_936,
            d_model=4096,
            n_layers=36,
            n_heads=32,
            n_kv_heads=8,
            d_head=128,
            rope=RopeConfig(theta=1e6),
            d_ff=12_288,
            n_experts=1,
            top_k=1,
            z_loss_coef=0.0,
            loss_chunk=256,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", final_lr=0.1),
        # 8.4 million tokens a step, 36 trillion in all.
        train=TrainConfig(steps=4_291_500, batch_size=2048, seq_len=4096),
        eval=EvalConfig(every=1000, batch_size=256),
        checkpoint=CheckpointConfig(every=1000),
        forecast=ForecastConfig(first=200_000, every=20_000),
    )


def qwen3_06b() -> Config:
    """Qwen3-0.6B: 0.596 billion parameters with the embedding once, as it is tied to the head."""
    base = qwen3()
    model = replace(
        base.model, d_model=1024, n_layers=28, tie_embeddings=True, n_heads=16, d_ff=3072
    )
    return replace(base, name="qwen3_06b", model=model)
