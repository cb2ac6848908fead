"""gpt-oss (OpenAI, arXiv:2508.10925)."""

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
    replace,
)


def gpt_oss() -> Config:
    """gpt-oss-20b: 20.91 billion parameters, 3.61 active (table 1).

    The shape is section 2.1's and that of the released openai/gpt-oss-20b. How it was trained is
    not public beyond "trillions of tokens" (section 2.4); rates, tokens, context and the losses of
    the router are ours.
    """
    return Config(
        name="gpt_oss",
        model=ModelConfig(
            vocab_size=201_088,
            d_model=2880,
            n_layers=24,
            norm_eps=1e-5,
            n_heads=64,
            n_kv_heads=8,
            d_head=64,
            rope=RopeConfig(
                theta=150_000.0,
                scaling="yarn",
                factor=32.0,
                original_length=4096,
                truncate=False,
            ),
            qk_norm="none",
            attention_bias=True,
            attention_sinks=True,
            sliding_window=128,
            global_every=2,
            d_ff=2880,
            n_experts=32,
            top_k=4,
            activation="clamped_swiglu",
            swiglu_limit=7.0,
            swiglu_alpha=1.702,
            expert_bias=True,
            # The softmax is over the chosen four: that over all, normalised again.
            router=RouterConfig(bias=True, load_balance_coef=0.001, z_coef=0.0),
            z_loss_coef=0.0,
            loss_chunk=256,
            dtype="bfloat16",
        ),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", final_lr=0.1),
        # 4.2 million tokens a step, 4.2 trillion in all.
        train=TrainConfig(steps=1_000_000, batch_size=1024, seq_len=4096),
        eval=EvalConfig(every=1000, batch_size=256),
        checkpoint=CheckpointConfig(every=1000),
        forecast=ForecastConfig(first=100_000, every=10_000),
    )


def gpt_oss_120b() -> Config:
    """116.83 billion parameters, 5.13 active (table 1): deeper, and with four times the experts."""
    base = gpt_oss()
    return replace(base, name="gpt_oss_120b", model=replace(base.model, n_layers=36, n_experts=128))
