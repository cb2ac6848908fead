"""The default run: a few million parameters, this machine's own text, minutes on two CPU cores."""

from jaxmoe.config import Config, DataConfig, EvalConfig, ForecastConfig, ModelConfig, replace

# Set aside before anything is read. Two distributions of our own lock and five packages of the
# standard library: library code of two schools, in none of the training text.
HELD_OUT = ("flax", "optax", "email", "http", "json", "logging", "urllib")


def quickstart() -> Config:
    return Config(name="quickstart", data=DataConfig(holdout=HELD_OUT))


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
        optim=replace(base.optim, warmup_steps=10),
        train=replace(base.train, steps=60, batch_size=8, seq_len=32, log_every=1),
        eval=EvalConfig(every=5, batch_size=32),
        checkpoint=replace(base.checkpoint, every=20),
        forecast=ForecastConfig(first=30, every=10),
    )
