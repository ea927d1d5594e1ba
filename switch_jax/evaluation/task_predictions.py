"""Predictions for fine-tuning tasks: generated text, or the most probable of several classes.

Axis letters: B rows of a batch · S input tokens · T output tokens · N examples · C classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from switch_jax.data import Vocabulary, padded_batch
from switch_jax.distributed import batch_sharding, replicated
from switch_jax.inference import generate
from switch_jax.model import MeshJit, ShardedModel, process_rows, row_cross_entropy

_LENGTH_MULTIPLE = 64  # inputs are padded to multiples; one program is compiled for each


class Predictor:
    """Predictor of texts, on the mesh of its model.

    All processes must call its methods, with the same arguments.
    """

    def __init__(self, sharded: ShardedModel, vocabulary: Vocabulary):
        self._sharded = sharded
        self._vocabulary = vocabulary
        self._ids = sharded.config.model  # of padding and EOS
        # As many rows as a microbatch of training has.
        self._batch_size = sharded.config.data.batch_size // sharded.config.train.accumulate
        self._row_indices = process_rows(sharded.mesh).indices(self._batch_size)
        on_all_devices = replicated(sharded.mesh)
        self._generate_tokens = MeshJit(
            sharded.mesh, self._generate_outputs, out_shardings=on_all_devices
        )
        self._log_likelihood = MeshJit(
            sharded.mesh, self._target_log_likelihood, out_shardings=on_all_devices
        )

    def generate(self, params: Mapping[str, jax.Array], inputs: Sequence[str]) -> list[str]:
        """Generates an output for each of N inputs."""
        outputs: list[str] = [""] * len(inputs)
        for numbers, source_BxS in self._input_batches(inputs):
            tokens_BxT = np.asarray(self._generate_tokens(params, source_BxS))
            for number, tokens_T in zip(numbers, tokens_BxT):
                ends = np.flatnonzero(tokens_T == self._ids.eos_id)
                output_tokens = tokens_T[: ends[0]] if len(ends) else tokens_T
                outputs[number] = self._vocabulary.decode(output_tokens.tolist())
        return outputs

    def most_probable_class(
        self, params: Mapping[str, jax.Array], inputs: Sequence[str], classes: Sequence[str]
    ) -> list[str]:
        """Returns, for each of N inputs, the most probable of C class names as output."""
        config = self._sharded.config
        targets = [self._encode(name, config.data.targets_length) for name in classes]
        data = dataclasses.replace(config.data, targets_length=max(map(len, targets)))
        config = dataclasses.replace(config, data=data)
        log_likelihood_NxC = np.empty((len(inputs), len(classes)))
        for numbers, source_BxS in self._input_batches(inputs):
            for c, target in enumerate(targets):
                rows = np.tile(np.array(target, np.int32), (len(self._row_indices), 1))
                batch = padded_batch(rows[:, :1], rows, config)
                batch.pop("encoder_input_tokens")
                global_batch = {name: self._to_global(value) for name, value in batch.items()}
                global_batch["encoder_input_tokens"] = source_BxS
                log_likelihood_B = np.asarray(self._log_likelihood(params, global_batch))
                log_likelihood_NxC[numbers, c] = log_likelihood_B[: len(numbers)]
        return [classes[c] for c in log_likelihood_NxC.argmax(-1)]

    def _generate_outputs(self, params, source_BxS):
        config = self._sharded.config
        model = self._sharded.model(params)
        return generate(
            model,
            source_BxS,
            max_length=config.data.targets_length,
            beam_size=config.eval.beam_size,
        )

    def _target_log_likelihood(self, params, batch):
        model = self._sharded.model(params)
        decoded, _ = model.route(batch, capacity_factor=None)
        return -row_cross_entropy(*model.logit_factors(decoded), batch)

    def _input_batches(self, inputs: Sequence[str]) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Yields batches of inputs of similar lengths: numbers of the inputs, global [B, S]."""
        B, max_length = self._batch_size, self._sharded.config.data.inputs_length
        encoded = [self._encode(text, max_length) for text in inputs]
        order = np.argsort([len(ids) for ids in encoded], kind="stable")
        for begin in range(0, len(order), B):
            numbers = order[begin : begin + B]
            longest = len(encoded[numbers[-1]])
            length = min(-(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, max_length)
            source_BxS = np.full((B, length), self._ids.pad_id, np.int32)
            source_BxS[:, 0] = self._ids.eos_id  # rows after the last example are empty texts
            for row, number in enumerate(numbers):
                source_BxS[row, : len(encoded[number])] = encoded[number]
            yield numbers, self._to_global(source_BxS[self._row_indices])

    def _to_global(self, rows: np.ndarray) -> jax.Array:
        """Returns the global array of a batch, from the rows of this process."""
        shape = (self._batch_size, *rows.shape[1:])
        sharding = batch_sharding(self._sharded.mesh)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    def _encode(self, text: str, max_length: int) -> list[int]:
        """Returns at most `max_length` tokens, the last of which is EOS."""
        return [*self._vocabulary.encode(text)[: max_length - 1], self._ids.eos_id]
