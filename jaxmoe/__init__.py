"""jaxmoe trains mixture-of-experts language models in JAX and forecasts their final loss."""

__version__ = "0.1.0"
