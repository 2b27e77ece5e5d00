"""Target texts after input texts with an encoder-decoder: writing them token by token, and scoring given ones.

To write, the inputs are read once. The decoder is driven by `inference.decoding.Generator`, which knows decoder-only
networks: `EncodedNetwork` is one, whose "parameters" are those of the network together with what was made of the inputs.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from t5x_ssm.errors import UserError
from t5x_ssm.inference.beam_search import Beams, BeamSearcher
from t5x_ssm.inference.decoding import Generator, Stream
from t5x_ssm.inference.sampling import GREEDY, Sampling
from t5x_ssm.inference.scoring import Scores, score_batch
from t5x_ssm.layers.attention import ENCODED
from t5x_ssm.models.objectives import SequenceToSequence

Array = jax.Array
# Inputs are padded to powers of two from here on, so that few lengths are compiled.
SHORTEST = 32


class EncodedNetwork:
    """The decoder of an encoder-decoder under the signature of a decoder-only network, for inputs that were read before.

    Its parameters are {'network': the module's, 'encoded': what `read_inputs` gives, 'inputs': int [B, S]}.

    Attributes:
      network: a module under T5X's encoder-decoder signature.
      scan_layers, vocab_size: the module's.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.scan_layers, self.vocab_size = network.scan_layers, network.vocab_size

    def apply(self, variables: dict[str, Any], tokens: Array, targets: Array, **call: Any) -> Any:
        """As a decoder-only module's `apply`; arguments as in `models.encoder_decoder.EncoderDecoder.decode`."""
        given = variables["params"]
        own = {**variables, "params": given["network"], ENCODED: given["encoded"]}
        return self.network.apply(own, None, given["inputs"], tokens, targets, method="decode", **call)


def read_inputs(network: nn.Module, params: Any, inputs: Array) -> Any:
    """The keys and values that the decoder's layers make of inputs, int [B, S]: 2 S · kv_heads · head_dim numbers a row and layer."""
    encoded = network.apply({"params": params}, inputs, enable_dropout=False, method="encode")
    token = jnp.zeros((inputs.shape[0], 1), jnp.int32)
    settings = {"enable_dropout": False, "method": "decode", "mutable": [ENCODED]}
    return network.apply({"params": params}, encoded, inputs, token, token, **settings)[1][ENCODED]


class PairGenerator:
    """Writes targets for inputs with one network.

    Attributes:
      network, params: the module and its parameters.
    """

    def __init__(self, network: nn.Module, params: Any):
        """Makes it.

        Args:
          network: a module under T5X's encoder-decoder signature.
          params: its parameters.
        """
        self.network, self.params = network, params
        self._read_inputs = jax.jit(functools.partial(read_inputs, network))
        one = jax.ShapeDtypeStruct((1, SHORTEST), jnp.int32)
        shapes = {"network": params, "encoded": jax.eval_shape(self._read_inputs, params, one), "inputs": one}
        self._generator = Generator(EncodedNetwork(network), shapes)
        self._searcher = BeamSearcher(self._generator)

    def generate(
        self,
        inputs: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        eos_id: int | None = 1,
        seeds: int | Sequence[int] = 0,
        steps_per_call: int = 1,
    ) -> Stream:
        """Writes a text for each row of `inputs`, int [B, S], padded with 0.

        Other arguments, result and errors as in `inference.decoding.Generator.generate`.

        Raises:
          UserError: the decoder has learned positions, and fewer than `max_new_tokens`.
        """
        given = self._read(inputs, max_new_tokens)
        generator = self._generator.with_params(given)
        state = generator.start(given["inputs"].shape[0], max_new_tokens)
        settings = {"eos_id": eos_id, "seeds": seeds, "steps_per_call": steps_per_call}
        return generator.generate(state, max_new_tokens, sampling, **settings)

    def search(self, inputs: np.ndarray, max_new_tokens: int, beams: int, **settings: Any) -> Beams:
        """The likeliest texts for each row of `inputs`, int [B, S], padded with 0.

        Other arguments, result and errors as in `inference.beam_search.BeamSearcher.search`, and errors as in `generate`.
        """
        given = self._read(inputs, max_new_tokens)
        state = self._generator.with_params(given).start(given["inputs"].shape[0], max_new_tokens)
        return self._searcher.with_params(given).search(state, max_new_tokens, beams, **settings)

    def _read(self, inputs: np.ndarray, max_new_tokens: int) -> dict[str, Any]:
        """The parameters of the `EncodedNetwork` for these inputs."""
        positions = self.network.decoder_positions
        if positions is not None and max_new_tokens > positions:
            raise UserError(
                f"max_new_tokens = {max_new_tokens}, but the decoder has only {positions} learned positions "
                "(MAX_TARGET_LENGTH)."
            )
        inputs = padded_to_power(np.asarray(inputs, np.int32))
        return {"network": self.params, "encoded": self._read_inputs(self.params, inputs), "inputs": inputs}


class PairScorer:
    """How likely a network finds targets after inputs.

    Attributes:
      network, params: the module and its parameters.
    """

    def __init__(self, network: nn.Module, params: Any):
        self.network, self.params = network, params
        self._score = jax.jit(functools.partial(score_batch, SequenceToSequence(network)))

    def score(self, inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> Scores:
        """Scores of each row's first lengths[b] targets.

        Args:
          inputs: int [B, S], padded with 0.
          targets: int [B, T].
          lengths: int [B].
        """
        targets = padded_to_power(np.asarray(targets, np.int32), self.network.decoder_positions)
        batch = {
            "encoder_input_tokens": padded_to_power(np.asarray(inputs, np.int32)),
            "decoder_input_tokens": np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (np.arange(targets.shape[1]) < lengths[:, None]).astype(np.int32),
        }
        return jax.tree.map(np.asarray, self._score(self.params, batch))


def padded_to_power(rows: np.ndarray, most: int | None = None) -> np.ndarray:
    """Rows [B, L] padded with 0 to the next power of two from `SHORTEST` on, but not beyond `most`."""
    length = SHORTEST
    while length < rows.shape[1]:
        length *= 2
    length = max(rows.shape[1], min(length, most or length))
    return np.pad(rows, [(0, 0), (0, length - rows.shape[1])])
