"""Switch-Base: T5-Base with 2 to 256 experts in every other feed-forward layer.

    switch-jax train --config configs/switch_base.py:num_experts=64 --workdir runs/switch_base \\
        --config.data.data_dir=DIR

124.6 GFLOP a sequence (forward pass over 512 + 114 tokens, by the paper's convention) with any
number of experts. With the default of 128 they take 29.71 GB of float32 parameters and
Adafactor state over all devices. Parameters by number of experts:

      2      279,545,088
      4      392,809,728
      8      619,339,008
     16    1,072,397,568
     32    1,978,514,688
     64    3,790,748,928
    128    7,415,217,408
    256   14,664,154,368

`variant=table9` has the same numbers.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg
from switch_jax.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """`num_experts` (128; a power of two from 2 to 256), `variant` ('' or 'table9')."""
    args = parse_arg(arg, num_experts=128, variant="")
    if args.num_experts not in (2, 4, 8, 16, 32, 64, 128, 256):
        raise UserError(
            "switch_base's num_experts must be a power of two from 2 to 256,"
            f" not {args.num_experts}."
        )
    if args.variant not in ("", "table9"):
        raise UserError(f"switch_base has no variant {args.variant!r}; there is 'table9'.")
    config = defaults()
    config.data.update(mixture="c4", reader="seqio")
    config.moe.num_experts = args.num_experts
    # The released checkpoints have ReLU layers of 3072, our default. Table 9 lists GEGLU
    # layers of 2048: as many weights, so that the paper's parameter count fits both.
    if args.variant == "table9":
        config.model.update(activation="geglu", d_ff=2048)
    return config
