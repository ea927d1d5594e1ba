"""MoE-Base: the paper's top-2 baseline, Switch-Base's 128 experts with two for each token.

    switch-jax train --config configs/moe_base.py --workdir runs/moe_base \\
        --config.data.data_dir=DIR

7,415,217,408 parameters, 160 GFLOP a sequence, 29.71 GB.
FLOPs are of the forward pass over 512 + 114 tokens, by the paper's convention with both
experts of a token; bytes are of float32 parameters and Adafactor state over all devices.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Takes no arguments."""
    parse_arg(arg)
    config = defaults()
    config.data.update(mixture="c4", reader="seqio")
    # Gates are the raw probabilities of the paper's eq. 2, and both experts always count. Mesh
    # TensorFlow's top-2, which the paper ran, divides the gates by their sum, keeps second experts
    # at random, rounds capacities down and has groups of at most 1024 tokens: for that set
    # renormalize=True, second_policy="random", capacity_rounding="floor" and group_size=1024.
    config.moe.update(num_experts=128, router="top_k", top_k=2)
    # Capacity has no factor k: of Table 1's 2.0, 1.25 and 1.0, 2.0 has a slot for either expert.
    config.moe.capacity_factor = 2.0
    return config
