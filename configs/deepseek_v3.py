"""DeepSeek-V3 (DeepSeek-AI, arXiv:2412.19437)."""

from jaxmoe.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ForecastConfig,
    MlaConfig,
    ModelConfig,
    OptimConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
)


def deepseek_v3() -> Config:
    """671 billion parameters, 37 active; and 11.5 of the module that predicts one token further.

    Shape and rates are section 4.2's. RoPE is as released: YaRN came after pre-training, with the
    longer contexts (section 4.3). Four things change on the way there and not here: the batch grows
    from 3072 over the first 469 billion tokens, mtp_coef falls to 0.1 after 10 trillion, the
    balance bias rests for the last 500 billion, and the rate falls as a cosine, then in two steps.
    """
    return Config(
        name="deepseek_v3",
        model=ModelConfig(
            vocab_size=129_280,
            d_model=7168,
            n_layers=61,
            n_heads=128,
            n_kv_heads=128,
            mla=MlaConfig(q_rank=1536, kv_rank=512, d_nope=128, d_rope=64, d_value=128),
            rope=RopeConfig(
                scaling="yarn",
                factor=40.0,
                original_length=4096,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
            qk_norm="none",
            d_ff=2048,
            n_experts=256,
            top_k=8,
            n_shared_experts=1,
            first_dense=3,
            d_ff_dense=18_432,
            router=RouterConfig(
                score="sigmoid",
                scale=2.5,
                n_groups=8,
                top_k_groups=4,
                load_balance_coef=1e-4,
                load_balance_scope="sequence",
                balance_bias_rate=0.001,
                z_coef=0.0,
            ),
            z_loss_coef=0.0,
            n_mtp=1,
            mtp_coef=0.3,
            loss_chunk=256,
            dtype="bfloat16",
        ),
        # Constant for 10 of 14.8 trillion tokens, then down to 7.3e-6.
        optim=OptimConfig(
            lr=2.2e-4, warmup_steps=2000, schedule="wsd", decay_fraction=0.324, final_lr=0.033
        ),
        # 62.9 million tokens a step, 14.8 trillion in all.
        train=TrainConfig(steps=235_200, batch_size=15_360, seq_len=4096),
        eval=EvalConfig(every=500, batch_size=1024),
        checkpoint=CheckpointConfig(every=500),
        forecast=ForecastConfig(first=20_000, every=2000),
    )
