"""OLMoE-1B-7B-0924 (Muennighoff et al., arXiv:2409.02060)."""

from jaxmoe.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ForecastConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    TrainConfig,
)


def olmoe() -> Config:
    """6.92 billion parameters, 1.28 active with the embedding.

    Shape and rates are those of the paper (section 2, appendix B) and of the released
    allenai/OLMoE-1B-7B-0924; batch, warm-up and losses also stand in configs/ of allenai/OLMoE.
    The last 100 billion tokens, whose rate falls to nothing on a better mixture, are left out.
    """
    return Config(
        name="olmoe",
        model=ModelConfig(
            vocab_size=50_304,
            d_model=2048,
            n_layers=16,
            norm_eps=1e-5,
            n_heads=16,
            n_kv_heads=16,
            d_head=128,
            qk_norm="full",
            d_ff=1024,
            n_experts=64,
            top_k=8,
            router=RouterConfig(
                norm_top_k=False,
                # 0.01 of a mean over layers (megablocks, layers/moe.py); ours is of a sum.
                load_balance_coef=0.01 / 16,
                load_balance_scope="microbatch",
                z_coef=0.001,
            ),
            z_loss_coef=0.0,
            loss_chunk=256,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr=4e-4, warmup_steps=2000, schedule="cosine", final_lr=0.1),
        # 4.2 million tokens a step, 5.133 trillion in all.
        train=TrainConfig(steps=1_223_842, batch_size=1024, seq_len=4096),
        eval=EvalConfig(every=1000, batch_size=256),
        checkpoint=CheckpointConfig(every=1000),
        forecast=ForecastConfig(first=100_000, every=10_000),
    )
