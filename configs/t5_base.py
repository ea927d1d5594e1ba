"""T5-Base, dense: as many FLOPs a token as Switch-Base.

    switch-jax train --config configs/t5_base.py --workdir runs/t5_base \\
        --config.data.data_dir=DIR

222,903,552 parameters, 124.6 GFLOP a sequence, 893.6 MB.
FLOPs are of the forward pass over 512 + 114 tokens, by the paper's convention; bytes are of
float32 parameters and Adafactor state over all devices. `variant=table9` has the same
numbers.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg
from switch_jax.errors import UserError


def get_config(arg: str = "") -> ConfigDict:
    """`variant` ('' or 'table9')."""
    args = parse_arg(arg, variant="")
    if args.variant not in ("", "table9"):
        raise UserError(f"t5_base has no variant {args.variant!r}; there is 'table9'.")
    config = defaults()
    config.data.update(mixture="c4", reader="seqio")
    # The default model is T5-Base with ReLU layers of 3072. Table 9 lists GEGLU layers of
    # 2048: as many weights, so that the paper's 223M parameters fit both.
    if args.variant == "table9":
        config.model.update(activation="geglu", d_ff=2048)
    return config
