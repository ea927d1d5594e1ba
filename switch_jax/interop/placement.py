"""Which layers have experts, as configuration."""

import itertools
from collections.abc import Mapping
from typing import Any

from switch_jax.errors import UserError
from switch_jax.schema import STACKS, Config, ModelConfig, MoEConfig
