"""What a model answers to texts: what it writes, or which of some classes is the likeliest.

B rows of a batch    S input tokens    T output tokens    N examples    C classes
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from switch_jax.data import EOS, Vocabulary, padded_batch
from switch_jax.distributed import batch_sharding, replicated
from switch_jax.inference import generate
from switch_jax.model import MeshJit, ShardedModel, process_rows, row_cross_entropy

_BUCKET = 64  # inputs are padded to multiples, each of which is a sharded of its own


class Predictor:
    """Lets a model answer, on the mesh of its sharded; all processes must call it alike."""

    def __init__(self, sharded: ShardedModel, vocabulary: Vocabulary):
        self._sharded = sharded
        self._vocabulary = vocabulary
        # As many at once as training has in memory.
        self._rows = sharded.config.data.batch_size // sharded.config.train.accumulate
        self._feed = process_rows(sharded.mesh).indices(self._rows)
        whole = replicated(sharded.mesh)
        self._generate = MeshJit(sharded.mesh, self._write, out_shardings=whole)
        self._score = MeshJit(sharded.mesh, self._likelihood, out_shardings=whole)

    def write(self, params: Mapping[str, jax.Array], inputs: Sequence[str]) -> list[str]:
        """What the model writes for each of N inputs."""
        outputs: list[str] = [""] * len(inputs)
        for numbers, source_BxS in self._sources(inputs):
            tokens_BxT = np.asarray(self._generate(params, source_BxS))
            for number, tokens_T in zip(numbers, tokens_BxT):
                ended = np.flatnonzero(tokens_T == EOS)
                kept = tokens_T[: ended[0]] if len(ended) else tokens_T
                outputs[number] = self._vocabulary.decode(kept.tolist())
        return outputs

    def rank(
        self, params: Mapping[str, jax.Array], inputs: Sequence[str], classes: Sequence[str]
    ) -> list[str]:
        """Of C classes, the one whose text is the most likely for each of N inputs."""
        data = self._sharded.config.data
        targets_C = [self._encoded(name, data.targets_length) for name in classes]
        data = dataclasses.replace(data, targets_length=max(map(len, targets_C)))
        likelihood_NxC = np.empty((len(inputs), len(classes)))
        for numbers, source_BxS in self._sources(inputs):
            for c, target in enumerate(targets_C):
                rows = np.tile(np.array(target, np.int32), (len(self._feed), 1))
                batch = padded_batch(rows[:, :1], rows, data)
                batch.pop("encoder_input_tokens")
                put = {name: self._put(value) for name, value in batch.items()}
                likelihood_B = np.asarray(
                    self._score(params, put | {"encoder_input_tokens": source_BxS})
                )
                likelihood_NxC[numbers, c] = likelihood_B[: len(numbers)]
        return [classes[c] for c in likelihood_NxC.argmax(-1)]

    def _write(self, params, source_BxS):
        config = self._sharded.config
        model = self._sharded.model(params)
        return generate(
            model,
            source_BxS,
            max_length=config.data.targets_length,
            beam_size=config.eval.beam_size,
        )

    def _likelihood(self, params, batch):
        model = self._sharded.model(params)
        decoded, _ = model.route(batch, capacity_factor=None)
        return -row_cross_entropy(*model.logit_factors(decoded), batch)

    def _sources(self, inputs: Sequence[str]) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Batches of inputs of similar lengths, as global arrays, and which ones they are."""
        B, longest = self._rows, self._sharded.config.data.inputs_length
        encoded = [self._encoded(text, longest) for text in inputs]
        order = np.argsort([len(ids) for ids in encoded], kind="stable")
        for begin in range(0, len(order), B):
            numbers = order[begin : begin + B]
            length = min(-(-len(encoded[numbers[-1]]) // _BUCKET) * _BUCKET, longest)
            source_BxS = np.zeros((B, length), np.int32)
            source_BxS[:, 0] = EOS  # rows behind the last example are texts without a word
            for row, number in enumerate(numbers):
                source_BxS[row, : len(encoded[number])] = encoded[number]
            yield numbers, self._put(source_BxS[self._feed])

    def _put(self, rows: np.ndarray) -> jax.Array:
        shape = (self._rows, *rows.shape[1:])
        where = batch_sharding(self._sharded.mesh)
        return jax.make_array_from_process_local_data(where, rows, shape)

    def _encoded(self, text: str, longest: int) -> list[int]:
        return [*self._vocabulary.encode(text)[: longest - 1], EOS]
