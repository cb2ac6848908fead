"""The config of these tests: a real run in a few seconds, on any mesh up to 8 devices."""

from jaxmoe.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ForecastConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def small() -> Config:
    return Config(
        name="small",
        model=ModelConfig(
            vocab_size=264,
            d_model=16,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            d_head=6,
            d_ff=20,
            n_experts=8,
            top_k=2,
            loss_chunk=8,
        ),
        data=DataConfig(
            holdout=("json", "http"),
            tokenizer="bytes",
            max_bytes=400_000,
            holdout_bytes=3_000,
        ),
        optim=OptimConfig(warmup_steps=3),
        train=TrainConfig(steps=24, batch_size=8, seq_len=24, log_every=1),
        eval=EvalConfig(every=2, batch_size=64),
        checkpoint=CheckpointConfig(every=6, keep=2),
        forecast=ForecastConfig(first=12, every=4),
    )
