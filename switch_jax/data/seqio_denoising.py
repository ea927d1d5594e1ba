"""The denoisers of `denoising.py` in TensorFlow; equal to T5's own for equal seeds."""

from collections.abc import Callable, Sequence

from switch_jax.data.denoising import Denoiser, IidDenoising, PrefixLM, SpanCorruption
from switch_jax.data.objectives import Objective
from switch_jax.data.seqio_import import seqio, tf

Example = dict[str, tf.Tensor]
_CHOICE = 5  # which of six seeds chooses the denoiser; T5 uses the first two


@seqio.map_over_dataset(num_seeds=1)
def add_noise(
    example: Example, seed: tf.Tensor, objective: Objective, sentinels: Sequence[int]
) -> Example:
    """Computes `Objective.apply` in TensorFlow, for one text, without the EOS."""
    tokens = example["targets"]
    seeds = tf.random.experimental.stateless_split(seed, 6)

    def with_denoiser(part: int) -> Callable[[], Example]:
        denoiser = objective.denoisers[part].denoiser
        mode = tf.constant(objective.modes[part], tokens.dtype)

        def split() -> Example:
            mask = noise_mask(denoiser, tf.size(tokens), seeds[:2])
            inputs, targets = (
                _omit(tokens, omitted, sentinels if denoiser.marks_runs else ())
                for omitted in (mask, ~mask)
            )
            return {"inputs": tf.concat([mode, inputs], axis=0), "targets": targets}

        return split

    branches = [with_denoiser(part) for part in range(len(objective.denoisers))]
    if len(branches) == 1:
        return branches[0]()
    uniform = tf.random.stateless_uniform([], seeds[_CHOICE])
    ends = tf.cumsum(tf.constant(objective.rates, tf.float32))[:-1]
    return tf.switch_case(tf.reduce_sum(tf.cast(uniform >= ends, tf.int32)), branches)


def noise_mask(denoiser: Denoiser, length: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """[length] bool: True at noise tokens.

    Args:
      seeds: [2, 2]; span corruption uses the first for the noise runs and the second for the
        kept runs, the other denoisers the first.
    """
    return _MASKS[type(denoiser)](denoiser, length, seeds)


def _span_mask(denoiser: SpanCorruption, length: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    padded = tf.maximum(length, 2)
    noise = tf.cast(tf.round(tf.cast(padded, tf.float32) * denoiser.noise_density), tf.int32)
    noise = tf.clip_by_value(noise, 1, padded - 1)
    runs = tf.cast(tf.round(tf.cast(noise, tf.float32) / denoiser.mean_span), tf.int32)
    runs = tf.clip_by_value(runs, 1, padded - noise)
    kept_lengths = _partition(padded - noise, runs, seeds[1])
    noise_lengths = _partition(noise, runs, seeds[0])
    all_lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
    return tf.repeat(tf.range(2 * runs) % 2 == 1, all_lengths)[:length]


def _iid_mask(denoiser: IidDenoising, length: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    return tf.random.stateless_uniform([length], seeds[0]) < denoiser.noise_density


def _prefix_mask(denoiser: PrefixLM, length: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    longest = length - 1
    shortest = (1 - 2 * denoiser.noise_density) * tf.cast(longest, tf.float32)
    shortest = tf.minimum(longest, tf.maximum(1, tf.cast(tf.round(shortest), tf.int32)))
    kept = tf.random.stateless_uniform([], seeds[0], shortest, length, tf.int32)
    return tf.range(length) >= kept


_MASKS: dict[type, Callable[..., tf.Tensor]] = {
    SpanCorruption: _span_mask,
    IidDenoising: _iid_mask,
    PrefixLM: _prefix_mask,
}


def _partition(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """[parts] positive integers that sum to `total`, uniform over all such rows."""
    # As in T5; tf.random's own shuffle would give other cuts for the same seed.
    order = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
    inner_cuts = 1 + tf.cast(tf.where(order < parts - 1)[:, 0], tf.int32)
    cuts = tf.concat([[0], inner_cuts, [total]], axis=0)
    return cuts[1:] - cuts[:-1]


def _omit(tokens: tf.Tensor, mask: tf.Tensor, sentinels: Sequence[int]) -> tf.Tensor:
    """Omits the tokens at Trues in `mask`; the next sentinel, if any, stands for each run."""
    if not sentinels:
        return tf.boolean_mask(tokens, ~mask)
    ids = tf.constant(sentinels, tokens.dtype)
    continues = mask & tf.pad(mask[:-1], [[1, 0]])
    starts = mask & ~continues
    runs = tf.clip_by_value(tf.cumsum(tf.cast(starts, tf.int32)) - 1, 0, len(sentinels) - 1)
    return tf.boolean_mask(tf.where(starts, tf.gather(ids, runs), tokens), ~continues)
