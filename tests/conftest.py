"""Eight simulated CPU devices for every test of this process."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: it looks for a TPU otherwise

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # starts the backend: nothing in a test changes it any more
