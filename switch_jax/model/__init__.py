"""The Switch Transformer: network, parameters, loss, sharding and FLOPs."""

from switch_jax.model.feed_forward import Mlp
from switch_jax.model.flops import (
    CONVENTIONS,
    ExpertLayer,
    expert_layers,
    flops_by_part,
    flops_per_sequence,
    format_si,
    mfu,
    params_by_group,
    train_flops,
)
from switch_jax.model.layers import FLOAT32_KINDS, cast_weights
from switch_jax.model.lora import add_adapters, init_adapters, is_adapter, merge_adapters
from switch_jax.model.loss import (
    LOGITS_BYTES,
    first_choice_counts,
    loss_denominators,
    loss_terms,
    router_metrics,
    row_cross_entropy,
    sparse_layer_names,
    token_losses,
)
from switch_jax.model.moe.cross_device_dispatch import padded_size, split_hops
from switch_jax.model.moe.expert_layers import SwitchMlp
from switch_jax.model.moe.grouped_matmul import MIN_BLOCK_ROWS, size_lower_bound
from switch_jax.model.moe.router import Router, RouterOutput, RoutingSpec
from switch_jax.model.parameters import (
    BATCH_DIMS,
    LayerSlice,
    ParameterMetadata,
    abstract_model,
    layer_shapes,
    layer_slices,
    logical_axes,
    named_parameters,
    parameter_metadata,
    stack_and_sublayer,
    with_parameters,
)
from switch_jax.model.sharded import Batch, MeshJit, ShardedModel, process_rows
from switch_jax.model.token_ids import check_token_ids
from switch_jax.model.transformer import (
    RouterStatsByStack,
    SwitchTransformer,
    collect_router_stats,
    token_masks,
)

__all__ = [
    "BATCH_DIMS",
    "CONVENTIONS",
    "FLOAT32_KINDS",
    "LOGITS_BYTES",
    "MIN_BLOCK_ROWS",
    "Batch",
    "ExpertLayer",
    "LayerSlice",
    "MeshJit",
    "Mlp",
    "ParameterMetadata",
    "Router",
    "RouterOutput",
    "RouterStatsByStack",
    "RoutingSpec",
    "ShardedModel",
    "SwitchMlp",
    "SwitchTransformer",
    "abstract_model",
    "add_adapters",
    "cast_weights",
    "check_token_ids",
    "collect_router_stats",
    "expert_layers",
    "first_choice_counts",
    "flops_by_part",
    "flops_per_sequence",
    "format_si",
    "init_adapters",
    "is_adapter",
    "layer_shapes",
    "layer_slices",
    "logical_axes",
    "loss_denominators",
    "loss_terms",
    "merge_adapters",
    "mfu",
    "named_parameters",
    "padded_size",
    "parameter_metadata",
    "params_by_group",
    "process_rows",
    "router_metrics",
    "row_cross_entropy",
    "size_lower_bound",
    "sparse_layer_names",
    "split_hops",
    "stack_and_sublayer",
    "token_losses",
    "token_masks",
    "train_flops",
    "with_parameters",
]
