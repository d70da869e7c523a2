"""Every test runs with shape and type checks on the package's functions, on 8 virtual devices."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook

install_import_hook("mtrec_jax", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
