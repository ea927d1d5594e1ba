"""Configuration: what can be set, how it is read, and what contradicts it."""

from switch_jax.config.expert_capacity import expert_capacity, rows_per_group
from switch_jax.config.json_files import parse_json, read_json
from switch_jax.config.key_descriptions import describe_groups, describe_keys
from switch_jax.config.load import (
    config_differences,
    config_from_dict,
    config_to_dict,
    defaults,
    flatten_config,
    load_config,
    override_config,
    parse_arg,
    read_config_file,
)
from switch_jax.config.own_code import is_own_code, load_own_code
from switch_jax.config.parameter_patterns import InitRule, parse_init_rules
from switch_jax.config.presets import (
    call_config_function,
    is_config_spec,
    preset_names,
    split_config_spec,
)
from switch_jax.config.schema import (
    MAX_FUSED_LENGTH,
    STACKS,
    BlockRun,
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    change_effect,
    key_roles,
)
from switch_jax.config.typed_values import build_dataclass, check_value
from switch_jax.config.validation import validate

__all__ = [
    "MAX_FUSED_LENGTH",
    "STACKS",
    "BlockRun",
    "Config",
    "DataConfig",
    "InitRule",
    "LoRAConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "build_dataclass",
    "call_config_function",
    "change_effect",
    "check_value",
    "config_differences",
    "config_from_dict",
    "config_to_dict",
    "defaults",
    "describe_groups",
    "describe_keys",
    "expert_capacity",
    "flatten_config",
    "is_config_spec",
    "is_own_code",
    "key_roles",
    "load_config",
    "load_own_code",
    "override_config",
    "parse_arg",
    "parse_init_rules",
    "parse_json",
    "preset_names",
    "read_config_file",
    "read_json",
    "rows_per_group",
    "split_config_spec",
    "validate",
]
