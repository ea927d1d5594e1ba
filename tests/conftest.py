"""Eight fake CPU devices, quick compilation, and the small configs and batches tests share."""

import gc
import os
import signal
import tempfile
from importlib import metadata
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

# A shell that puts the tests in the background lets them, and what they start, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing allocates many objects that live long: fewer collections save a tenth of the time.
gc.freeze()
gc.set_threshold(200_000, 20, 100)

# Processes that tests start find the package compiled, as an installed one is.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# All of this must be set before JAX is imported. Compilation is most of what tests cost:
# little optimisation makes it twice as fast, and workers share what they have compiled.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if metadata.version("jaxlib").startswith("0.10."):  # unknown to later ones, and fatal there
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    # As `switch-jax` starts with, so that its processes find what was compiled here.
    _FLAGS.append("--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT")
os.environ["XLA_FLAGS"] = " ".join((*_FLAGS, os.environ.get("XLA_FLAGS", "")))
os.environ["JAX_PLATFORMS"] = "cpu"
_CACHE = Path(
    os.environ.get("SWITCH_JAX_CACHE")
    or Path(tempfile.gettempdir()) / f"switch_jax_tests_{os.getuid()}"
)
os.environ["SWITCH_JAX_CACHE"] = str(_CACHE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "tests_xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

_SLOW_FOLDERS = [Path(__file__).parent / name for name in ("cli", "clusters", "end_to_end")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of whole commands, servers and schedulers as slow."""
    for item in items:
        if any(folder in item.path.parents for folder in _SLOW_FOLDERS):
            item.add_marker("slow")
