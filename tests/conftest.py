"""Eight simulated CPU devices for the tests of this process, and each program compiled once."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: it looks for a TPU otherwise

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # starts the backend: nothing in a test changes it any more

# Many tests convert the same tiny models: a program is compiled once in a run (of each worker).
# Processes that tests start use what is there, and add nothing, since some are killed on purpose.
COMPILED = tempfile.TemporaryDirectory(prefix="maxconv-tests-compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1000000"
