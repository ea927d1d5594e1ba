"""T5-XXL, dense: as many FLOPs a token as Switch-XXL.

    switch-jax train --config configs/t5_xxl.py --workdir runs/t5_xxl \\
        --config.data.data_dir=DIR --config.mesh.fsdp=True

11,135,332,352 parameters, 6.26 TFLOP a sequence, 44.56 GB.
FLOPs are of the forward pass over 512 + 114 tokens, by the paper's convention; bytes are of
float32 parameters and Adafactor state over all devices.
"""

from ml_collections import ConfigDict

from switch_jax.config import defaults, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Takes no arguments."""
    parse_arg(arg)
    config = defaults()
    config.data.update(mixture="c4", reader="seqio")
    # Untied as in Switch-XXL; the paper's 11B parameters round from 11.0B tied as well.
    config.model.update(
        d_model=4096,
        d_ff=10240,
        num_heads=64,
        num_encoder_layers=24,
        num_decoder_layers=24,
        activation="geglu",
        tied_embeddings=False,
    )
    return config
