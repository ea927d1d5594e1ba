"""Switch-Large: T5-Large with 128 experts in every other feed-forward layer.

    switch-jax train --config configs/switch_large.py --workdir runs/switch_large \\
        --config.data.data_dir=DIR

    default         26,309,291,008 parameters   424.9 GFLOP a sequence   105.4 GB
    variant=table9  27,120,888,832 parameters   432.8 GFLOP a sequence   108.6 GB

FLOPs are of the forward pass over 512 + 114 tokens, by the paper's convention; bytes are of
float32 parameters and Adafactor state over all devices.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg
from switch_jax.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """`variant` ('' or 'table9')."""
    args = parse_arg(arg, variant="")
    if args.variant not in ("", "table9"):
        raise UserError(f"switch_large has no variant {args.variant!r}; there is 'table9'.")
    config = defaults()
    config.data.update(mixture="c4", reader="seqio")
    # ReLU layers of 4096 as in the released checkpoint: they give the paper's 26B parameters
    # and 425B FLOPs. The GEGLU layers of 2816 of its Table 9 give 27B and 433B.
    config.model.update(
        d_model=1024, d_ff=4096, num_heads=16, num_encoder_layers=24, num_decoder_layers=24
    )
    config.moe.update(num_experts=128, group_size=4096)
    if args.variant == "table9":
        config.model.update(activation="geglu", d_ff=2816)
    return config
