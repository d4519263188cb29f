"""Eight CPU devices before JAX starts, float64 on request."""

from __future__ import annotations

import gc
import importlib.metadata
import os

# benchmarks/accelerator.py runs some of the tests on its device.
os.environ["JAX_PLATFORMS"] = os.environ.get("KFE_OPTAX_TESTS_ON", "cpu")
# Several test processes on few cores: threads of one LAPACK call would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compilation dominates the test time, and tiny shapes gain nothing from expensive optimization passes.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_backend_optimization_level": "0",
    # A test process has one core.
    "--xla_cpu_parallel_codegen_split_count": "1",
}
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    # The older emitters compile twice as fast. From 0.11.2 on the flag is unknown, which would end the process.
    _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()

import jax
import pytest

# Tracing makes millions of objects that live as long as their program: looking through them often finds nothing.
gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def x64():
    """Everything in this test is computed in float64."""
    with jax.enable_x64(True):
        yield
