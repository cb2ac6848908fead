"""Llama 3.1 8B and Llama 3.2 1B (Llama Team, arXiv:2407.21783): dense models."""

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


def llama() -> Config:
    """Llama 3.1 8B: 8.03 billion parameters.

    Shape and peak rate are table 3's, RoPE is as released: its scaling came with the longer
    contexts (section 3.4.2). Warm-up, cosine and batch are those of the 405B model (section 3.4.1)
    in its middle; those of the 8B model are not public.
    """
    return Config(
        name="llama",
        model=ModelConfig(
            vocab_size=128_256,
            d_model=4096,
            n_layers=32,
            norm_eps=1e-5,
            n_heads=32,
            n_kv_heads=8,
            d_head=128,
            rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192),
            qk_norm="none",
            d_ff=14_336,
            n_experts=1,
            top_k=1,
            z_loss_coef=0.0,
            loss_chunk=256,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr=3e-4, warmup_steps=8000, schedule="cosine", final_lr=0.01),
        # 8.4 million tokens a step, 15.6 trillion in all.
        train=TrainConfig(steps=1_859_600, batch_size=1024, seq_len=8192),
        eval=EvalConfig(every=1000, batch_size=256),
        checkpoint=CheckpointConfig(every=1000),
        forecast=ForecastConfig(first=100_000, every=10_000),
    )


def llama_1b() -> Config:
    """Llama 3.2 1B: 1.236 billion parameters with the embedding once, as it is tied to the head.

    The shape of the released meta-llama/Llama-3.2-1B, and its 9 trillion tokens (the model card).
    It was pruned from the 8B model and distilled, which this does not repeat.
    """
    base = llama()
    model = replace(
        base.model,
        d_model=2048,
        n_layers=16,
        tie_embeddings=True,
        d_head=64,
        rope=replace(base.model.rope, factor=32.0),
        d_ff=8192,
    )
    return replace(base, name="llama_1b", model=model, train=replace(base.train, steps=1_072_800))
