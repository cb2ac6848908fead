"""A ladder of seconds: real training on bytes, four rungs and more."""

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


def rung(k: int) -> Config:
    """Width 8 to 8 (k + 1), tokens with it: two decades of compute over four rungs."""
    width, steps = 8 * (k + 1), 20 * (k + 1)
    return Config(
        model=ModelConfig(
            vocab_size=264,
            d_model=width,
            n_layers=1,
            n_heads=2,
            n_kv_heads=1,
            d_head=4 * (k + 1),
            d_ff=width,
            n_experts=4,
            top_k=2,
            loss_chunk=8,
        ),
        data=DataConfig(
            holdout=("json", "http"), tokenizer="bytes", max_bytes=400_000, holdout_bytes=3_000
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=4, decay_fraction=0.25),
        train=TrainConfig(steps=steps, batch_size=8, seq_len=24, log_every=2),
        eval=EvalConfig(every=4, batch_size=64),
        checkpoint=CheckpointConfig(every=8, keep=1),
        forecast=ForecastConfig(first=400, every=400),
    )


def broken(k: int) -> Config:
    """The third rung cannot train: there is no such folder of text."""
    from dataclasses import replace

    config = rung(k)
    return replace(config, data=replace(config.data, path="/no/such/folder")) if k == 1 else config


def growing(k: int) -> Config:
    """A rung that is not of one recipe with the others."""
    from dataclasses import replace

    config = rung(k)
    return replace(config, optim=replace(config.optim, clip=1.0 + k))
