"""The default run: a few million parameters, real text from this machine, minutes on two CPU cores."""

from jaxmoe.config import Config, DataConfig, ModelConfig, replace

# Set aside before anything is read. Two distributions of our own lock and five packages of the
# standard library: library code of two schools, in none of the training text.
HELD_OUT = ("flax", "optax", "email", "http", "json", "logging", "urllib")


def quickstart() -> Config:
    return Config(name="quickstart", data=DataConfig(holdout=HELD_OUT))


def tiny() -> Config:
    """Seconds a run, for tests and first tries; every axis of the model has its own size."""
    base = quickstart()
    return replace(
        base,
        name="tiny",
        model=ModelConfig(
            vocab_size=320, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8,
            d_ff=40, n_experts=8, top_k=2, loss_chunk=16,
        ),
    )
