"""Writes tests/golden/*.npz: what Hugging Face's models compute from random weights.

    pip install torch 'transformers>=5.19'
    python scripts/make_reference.py tests/golden

The files there were made with torch 2.13.0 (CPU), transformers 5.23.0 and numpy 2.4.6.
Nothing is downloaded. Two runs with these versions give equal bytes. transformers 5.0 to
at least 5.14 have a broken Switch router (issue 48293: its capacity never binds).

A file holds one tiny encoder-decoder:

    config                          JSON; the names of this project's configuration
    param/<Hugging Face's name>     float16, exactly the weights that were used; a tied
                                    embedding appears once, as `shared.weight`
    encoder_input_tokens [B, S]     and decoder_input_tokens [B, T]: int32, without padding
    encoder_states [B, S, d_model]  float32, after the encoder's final norm
    logits [B, T, vocab_size]       float32, with the output scaling of tied embeddings
    padded/…                        encoder_input_tokens, encoder_mask and logits where the
                                    second row is padded on the right; same decoder tokens
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

BATCH, SOURCE, TARGET, UNPADDED = 2, 40, 24, 27
SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 48,
    # Distances in these sequences reach the logarithmic buckets and the last one, too.
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "attn_implementation": "eager",
}
GRID = 64  # weights are multiples of 1/64: exact in float16, and they compress well


def t5_relu_tied() -> PreTrainedModel:
    """T5 1.0; its tied output is scaled by d_model^-0.5."""
    return T5ForConditionalGeneration(T5Config(num_layers=2, feed_forward_proj="relu", **SIZES))


def t5_geglu_untied() -> PreTrainedModel:
    """T5 1.1. Hugging Face's "gated-gelu" is `gelu_new`, the tanh approximation."""
    config = T5Config(
        num_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **SIZES
    )
    assert config.dense_act_fn == "gelu_new"
    model = T5ForConditionalGeneration(config)
    # transformers ties the head whatever the configuration says, unless a checkpoint
    # brings its own; `tie_word_embeddings` only decides about the scaling.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def switch_relu_tied() -> PreTrainedModel:
    """Every second layer is sparse; with room for a whole sequence, no expert drops a token."""
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            num_layers=4,
            num_decoder_layers=4,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
            num_experts=4,
            expert_capacity=SOURCE,
            router_jitter_noise=0.0,
            dense_act_fn="relu",
            **SIZES,
        )
    )


def randomise(model: PreTrainedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Overwrites all parameters, for activations of order one; returns them by name."""
    params = {name: param.data for name, param in sorted(model.named_parameters())}
    for name, param in params.items():
        noise = torch.randn(param.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name == "shared.weight" or name.endswith("relative_attention_bias.weight"):
            value = noise
        else:  # a linear map, [out, in]
            value = noise * param.shape[1] ** -0.5
            if "router" in name:
                value *= 2  # so that routing is decisive
        param.copy_((value * GRID).round() / GRID)
        assert torch.equal(param, param.half().float())
    return params


@torch.no_grad()
def run(model, params, encoder_tokens, mask, decoder_tokens) -> tuple[np.ndarray, np.ndarray]:
    """Encoder states and logits, after checking the head and the routing."""
    is_switch = isinstance(model, SwitchTransformersForConditionalGeneration)
    out = model(
        input_ids=encoder_tokens,
        attention_mask=mask,
        decoder_input_ids=decoder_tokens,
        use_cache=False,
        **({"output_router_logits": True} if is_switch else {}),
    )
    states = model.decoder(
        input_ids=decoder_tokens,
        encoder_hidden_states=out.encoder_last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    if "lm_head.weight" in params:  # own weights, no scaling
        assert not torch.allclose(params["lm_head.weight"], params["shared.weight"])
        expected = states @ params["lm_head.weight"].T
    else:
        expected = states * model.config.d_model**-0.5 @ params["shared.weight"].T
    torch.testing.assert_close(out.logits, expected)
    if is_switch:
        routers = (*out.encoder_router_logits, *out.decoder_router_logits)
        assert len(routers) == 4  # two sparse layers a stack
        for logits in routers:
            first, second = logits.topk(2).values.unbind(-1)
            assert (first - second).min() > 1e-3  # rounding cannot send a token elsewhere
            assert set(logits.argmax(-1).flatten().tolist()) == set(range(4))
    return out.encoder_last_hidden_state.numpy(), out.logits.numpy()


def reference(model: PreTrainedModel, seed: int) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    params = randomise(model, generator)
    vocab = SIZES["vocab_size"]
    encoder_tokens = torch.randint(1, vocab, (BATCH, SOURCE), generator=generator)
    decoder_tokens = torch.randint(1, vocab, (BATCH, TARGET), generator=generator)
    decoder_tokens[:, 0] = 0
    mask = torch.ones_like(encoder_tokens)
    padded_mask = mask.clone()
    padded_mask[1, UNPADDED:] = 0
    padded_tokens = encoder_tokens * padded_mask

    states, logits = run(model, params, encoder_tokens, mask, decoder_tokens)
    _, padded_logits = run(model, params, padded_tokens, padded_mask, decoder_tokens)
    hf = model.config
    config = {
        **{key: SIZES[key] for key in ("vocab_size", "d_model", "d_ff", "num_heads")},
        "head_dim": hf.d_kv,
        "num_encoder_layers": hf.num_layers,
        "num_decoder_layers": hf.num_decoder_layers,
        "activation": "geglu" if hf.dense_act_fn == "gelu_new" else hf.dense_act_fn,
        "tied_embeddings": "lm_head.weight" not in params,
        "relative_buckets": hf.relative_attention_num_buckets,
        "relative_max_distance": hf.relative_attention_max_distance,
        "num_experts": getattr(hf, "num_experts", 0),
        "every": getattr(hf, "encoder_sparse_step", 2),
    }
    return {
        "config": np.array(json.dumps(config)),
        **{f"param/{name}": param.half().numpy() for name, param in params.items()},
        "encoder_input_tokens": encoder_tokens.numpy().astype(np.int32),
        "decoder_input_tokens": decoder_tokens.numpy().astype(np.int32),
        "encoder_states": states,
        "logits": logits,
        "padded/encoder_input_tokens": padded_tokens.numpy().astype(np.int32),
        "padded/encoder_mask": padded_mask.numpy().astype(np.int32),
        "padded/logits": padded_logits,
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed, make in enumerate((t5_relu_tied, t5_geglu_untied, switch_relu_tied)):
        path = folder / f"{make.__name__}.npz"
        np.savez_compressed(path, **reference(make(), seed))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
