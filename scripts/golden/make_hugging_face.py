"""Writes tests/golden/*.npz: outputs of Hugging Face's models for random weights.

    pip install torch 'transformers>=5.23'
    python scripts/golden/make_hugging_face.py tests/golden

The files there were made with torch 2.14.1 (CPU), transformers 5.23.0 and numpy 2.4.6. Nothing is
downloaded. transformers 5.0 to at least 5.14 have a broken Switch router (issue 48293: its capacity
never binds).

A file holds one tiny encoder-decoder:

    config                          the JSON that transformers saves beside the weights
    param/<Hugging Face's name>     float16, exactly the weights that were used; a tied
                                    embedding appears once, as `shared.weight`
    encoder_input_tokens [B, S]     int32, the last row padded on the right
    decoder_target_tokens [B, T]    int32, and decoder_input_tokens, the same shifted right
    encoder_states [B, S, d_model]  float32, after the encoder's final norm
    logits [B, T, vocab_size]       float32, teacher-forced, with the scaling of tied embeddings
    loss                            mean cross-entropy of the targets, in nats
    grad/<Hugging Face's name>      its gradients; of experts without a token, zeros
    router/<stack> [n, B, L, E]     probabilities of the n expert layers; Switch only
    greedy, beams [B, N]            what `generate` returns behind the start token; past the end, 0
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Callable
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
GENERATED, BEAMS, EOS = 16, 3, 1
SIZES = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "num_heads": 2,
    "d_ff": 24,
    # Distances in these sequences reach the logarithmic buckets and the last one, too.
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
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


def _switch(expert_capacity: int) -> PreTrainedModel:
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            num_layers=4,
            num_decoder_layers=4,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
            num_experts=4,
            expert_capacity=expert_capacity,
            router_jitter_noise=0.0,
            dense_act_fn="relu",
            **SIZES,
        )
    )


def switch_relu_tied() -> PreTrainedModel:
    """Every second layer is sparse; with room for a whole sequence, no expert drops a token."""
    return _switch(SOURCE)


def switch_dropping() -> PreTrainedModel:
    """The same, with room for a fair share of a target and less than one of a source."""
    return _switch(6)


MAKERS = (t5_relu_tied, t5_geglu_untied, switch_relu_tied, switch_dropping)


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Overwrites all parameters, for activations of order one."""
    for name, param in sorted(model.named_parameters()):
        noise = torch.randn(param.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name == "shared.weight" or name.endswith("relative_attention_bias.weight"):
            value = noise
        else:  # a linear map, [out, in]
            value = noise * param.shape[1] ** -0.5
            if "router" in name:
                value *= 2  # so that routing is decisive
        if name in ("shared.weight", "lm_head.weight"):
            value[EOS] *= 2  # or a sequence would seldom end
        param.data.copy_((value * GRID).round() / GRID)
        assert torch.equal(param, param.half().float())


def is_switch(model: PreTrainedModel) -> bool:
    return isinstance(model, SwitchTransformersForConditionalGeneration)


def forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Returns the results of a forward and a backward pass."""
    model.zero_grad()
    # Without the router's losses, which transformers adds where it is asked for logits.
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    arrays = {
        "encoder_states": out.encoder_last_hidden_state,
        "logits": out.logits,
        "loss": out.loss,
    }
    for name, param in model.named_parameters():
        arrays[f"grad/{name}"] = torch.zeros_like(param) if param.grad is None else param.grad
    if is_switch(model):
        with torch.no_grad():
            routed = model(**inputs, use_cache=False, output_router_logits=True)
        for stack in ("encoder", "decoder"):
            logits = torch.stack(list(routed[f"{stack}_router_logits"]))
            arrays[f"router/{stack}"] = logits.softmax(-1)
    return {name: array.detach().numpy() for name, array in arrays.items()}


@torch.no_grad()
def generate(model: PreTrainedModel, tokens: torch.Tensor, beams: int) -> np.ndarray:
    """[B, GENERATED] int32; beams by log probability, without a length penalty."""
    out = model.generate(
        input_ids=tokens,
        attention_mask=(tokens > 0).long(),
        max_new_tokens=GENERATED,
        num_beams=beams,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )[:, 1:].numpy()
    padded = np.zeros((len(out), GENERATED), np.int32)
    for row, found in zip(padded, out):
        length = list(found).index(EOS) + 1 if EOS in found else len(found)
        row[:length] = found[:length]  # beams are filled up with EOS
    return padded


def is_robust(arrays: dict[str, np.ndarray]) -> bool:
    """Whether routing is robust to rounding, and sequences end both early and late."""
    for name, probs in arrays.items():
        if name.startswith("router/"):
            first, second = np.sort(probs, -1)[..., :-3:-1].swapaxes(0, -1)
            if (first - second).min() < 1e-3 or len(np.unique(probs.argmax(-1))) < 4:
                return False
    greedy, beams = arrays["greedy"], arrays["beams"]
    ends = (greedy == EOS).any(-1).any() and (beams == EOS).any(-1).all()
    return bool(ends and greedy[:, 4].any() and beams[:, 1].any())


def compute(model: PreTrainedModel, source: torch.Tensor, target: torch.Tensor) -> dict:
    """Returns all arrays of a file, for the model's parameters and the tokens [B, L]."""
    model.eval()
    inputs = {"input_ids": source, "attention_mask": (source > 0).long(), "labels": target}
    shifted = torch.nn.functional.pad(target, (1, 0))[:, :-1]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
    params = {name: param.detach().half().numpy() for name, param in model.named_parameters()}
    return {
        "config": np.array(json.dumps(config)),
        **{f"param/{name}": value for name, value in sorted(params.items())},
        "encoder_input_tokens": source.numpy().astype(np.int32),
        "decoder_input_tokens": shifted.numpy().astype(np.int32),
        "decoder_target_tokens": target.numpy().astype(np.int32),
        **forward(model, inputs),
        "greedy": generate(model, source, 1),
        "beams": generate(model, source, BEAMS),
    }


def reference(make: Callable[[], PreTrainedModel]) -> dict[str, np.ndarray]:
    """Returns the arrays of one file, of the first seed that is `is_robust`; takes minutes."""
    model = make()
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        randomise(model, generator)
        vocab = SIZES["vocab_size"]
        source = torch.randint(2, vocab, (BATCH, SOURCE), generator=generator)
        target = torch.randint(2, vocab, (BATCH, TARGET), generator=generator)
        source[-1, UNPADDED:] = 0
        arrays = compute(model, source, target)
        # transformers and T5X do not have the same rules for beams. What many find is what both do.
        if is_robust(arrays) and (generate(model, source, 4 * BEAMS) == arrays["beams"]).all():
            return arrays
    raise AssertionError


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/golden")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for make in MAKERS:
        path = folder / f"{make.__name__}.npz"
        np.savez_compressed(path, **reference(make))
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
