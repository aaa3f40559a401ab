"""Eight CPU devices for every test, and code that is compiled quickly; set before JAX starts.

Most of a test's time is LLVM's. Its optimizations are left out (XLA's own are not), which halves that; what is
optimized runs in the README's commands, and here too where the environment's XLA_FLAGS say so.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    )
)
