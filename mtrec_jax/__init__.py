"""mtrec_jax: from raw behaviour logs to trained multi-task recommenders, in JAX."""

__version__ = "0.1.0"
