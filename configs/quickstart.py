"""The default run: a few million parameters, this machine's own text, minutes on two CPU cores."""

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

# Set aside before anything is read. Two distributions of our own lock and five packages of the
# standard library: library code of two schools, in none of the training text.
HELD_OUT = ("flax", "optax", "email", "http", "json", "logging", "urllib")


def quickstart() -> Config:
    """Sizes and rates are the best of LOG.md, 2026-11-22, for three minutes of training."""
    return Config(
        name="quickstart",
        model=ModelConfig(vocab_size=2048),
        data=DataConfig(holdout=HELD_OUT, holdout_bytes=130_000),
        optim=OptimConfig(lr=5e-3, warmup_steps=50, decay_fraction=0.3),
        train=TrainConfig(steps=700, batch_size=8, seq_len=256, log_every=10),
        eval=EvalConfig(every=50),
        checkpoint=CheckpointConfig(every=100),
        forecast=ForecastConfig(first=200, every=100),
    )


def tiny() -> Config:
    """Seconds a run, for tests and first tries; every dim has a size of its own."""
    base = quickstart()
    return replace(
        base,
        name="tiny",
        model=ModelConfig(
            vocab_size=320,
            d_model=24,
            n_layers=3,
            n_heads=4,
            n_kv_heads=2,
            d_head=8,
            d_ff=40,
            n_experts=16,
            top_k=3,
            loss_chunk=16,
        ),
        data=replace(base.data, max_bytes=2_000_000, tokenizer_bytes=500_000, holdout_bytes=40_000),
        optim=OptimConfig(warmup_steps=10),
        train=replace(base.train, steps=60, batch_size=8, seq_len=32, log_every=1),
        eval=EvalConfig(every=5, batch_size=32),
        checkpoint=replace(base.checkpoint, every=20),
        forecast=ForecastConfig(first=30, every=10),
    )
