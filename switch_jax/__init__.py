"""switch_jax: pretrain, fine-tune, distil and analyse Switch Transformers in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name → module. Imported on first use: `switch-jax --help` must not wait for JAX.
_PUBLIC = {
    "load": "switch_jax.checkpoint",
    "generate": "switch_jax.inference",
    "Config": "switch_jax.config",
    "UserError": "switch_jax.errors",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
