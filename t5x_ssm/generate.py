"""Writes text after a prompt, token by token as it comes.

    python -m t5x_ssm.generate --model_dir=RUN_FOLDER --prompt="Once upon" [--temperature=0.8 --top_k=40 --top_p=0.95]
    echo "Once upon" | python -m t5x_ssm.generate --model_dir=RUN_FOLDER

The prompt is read in pieces by convolution, then every token costs one step of the recurrence: time and memory per token do
not depend on how long the text is, unless the network has full attention.
"""

import argparse
import codecs
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import numpy as np

from t5x_ssm import config as config_lib
from t5x_ssm.errors import UserError
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.inference.sampling import Sampling
from t5x_ssm.models.objectives import Classification, SequenceToSequence
from t5x_ssm.parallel import mesh as mesh_lib
from t5x_ssm.train import use_compilation_cache
from t5x_ssm.training import restoring
from t5x_ssm.training.host_memory import keep_freed_memory
from t5x_ssm.training.sharded_state import abstract_parameters
from tasks import vocabularies


class TextCodec(NamedTuple):
    """Text to ids and back.

    Attributes:
      encode: text to ids, without EOS.
      decoder: makes a function that takes ids as they come and returns the text that they complete.
      eos_id: the id that ends a text.
      size: number of ids; the network's table may be larger.
    """

    encode: Callable[[str], list[int]]
    decoder: Callable[[], Callable[[Iterable[int]], str]]
    eos_id: int | None
    size: int


# Ids that a decoder of pieces keeps to see how the next one joins on, and how many it lets pile up.
_CONTEXT, _WINDOW = 16, 64


class Writer(NamedTuple):
    """A model ready to write."""

    generator: Generator
    codec: TextCodec


def open_writer(*, model: Any, checkpoint_path: str, mixture_or_task_name: str) -> Writer:
    """Restores the parameters of `model` and finds the vocabulary they were trained with.

    Args:
      model: the objective; its network writes.
      checkpoint_path: a checkpoint or a run folder.
      mixture_or_task_name: whose vocabulary to use where the checkpoint does not name the byte vocabulary.

    Raises:
      UserError: the model is no decoder.
    """
    if isinstance(model, SequenceToSequence):
        raise UserError(
            "MODEL is an encoder-decoder, which continues no prompt; python -m t5x_ssm.infer writes what it makes of a task's "
            "inputs."
        )
    restored = restore_network(model, checkpoint_path)
    vocabulary = (restored.metadata or {}).get("vocabulary", {})
    if vocabulary.get("name") == "ByteVocabulary" and not vocabulary.get("extra_ids"):
        codec = byte_codec()
    else:
        codec = seqio_codec(mixture_or_task_name, vocabulary.get("hash"))
    return Writer(Generator(model.network, restored.params), codec)


def restore_network(model: Any, checkpoint_path: str) -> restoring.RestoredParameters:
    """Parameters of `model` from a checkpoint or a run folder, on one device; of several processes, on one of each.

    Raises:
      UserError: it is a classifier.
    """
    if isinstance(model, Classification):
        raise UserError("MODEL is a classifier, which writes no text; python -m t5x_ssm.eval tells its accuracy.")
    use_compilation_cache()
    keep_freed_memory()
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = mesh_lib.make_mesh(devices=[firsts[process] for process in sorted(firsts)])
    names = ("decoder_input_tokens", "encoder_input_tokens")  # An objective takes what it knows.
    shapes = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in names}
    restored = restoring.restore_parameters(checkpoint_path, abstract_parameters(model, shapes, mesh))
    # Along `data`, the mesh's only axis, they are whole on every device.
    return restored._replace(params=jax.tree.map(lambda leaf: leaf.addressable_data(0), restored.params))


def byte_codec() -> TextCodec:
    """The byte vocabulary; a character appears when its last byte has come, and invalid UTF-8 becomes U+FFFD."""

    def decoder():
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids: incremental.decode(vocabularies.decode_bytes(ids))

    return TextCodec(
        lambda text: vocabularies.encode_bytes(text.encode("utf-8", errors="surrogateescape")),
        decoder,
        vocabularies.EOS_ID,
        vocabularies.BYTE_VOCABULARY_SIZE,
    )


def seqio_codec(mixture_or_task_name: str, expected_hash: str | None) -> TextCodec:
    """The vocabulary of a registered task's targets.

    Raises:
      UserError: it is not the one that the checkpoint was trained with.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from tasks import cache

    try:
        vocabulary = cache.registered(mixture_or_task_name).output_features["targets"].vocabulary
    except cache.CacheError as error:
        raise UserError(str(error)) from error
    if expected_hash is not None and vocabularies.describe(vocabulary)["hash"] != expected_hash:
        raise UserError(f"The vocabulary of {mixture_or_task_name!r} is not the one the checkpoint was trained with.")
    return TextCodec(
        vocabulary.encode, lambda: piecewise_decoder(vocabulary.decode), vocabulary.eos_id, vocabulary.vocab_size
    )


def piecewise_decoder(decode: Callable[[list[int]], str]) -> Callable[[Iterable[int]], str]:
    """Decodes ids as they come, where how a piece prints depends on its neighbours.

    Decodes the newest ids together and returns what is new and settled: an incomplete character at the end, which shows
    as U+FFFD, waits for its rest. Only the last ids are kept, so time and memory do not grow with the text.

    Args:
      decode: all ids of a text to the text.
    """
    window: list[int] = []
    shown = ""

    def decode_more(ids: Iterable[int]) -> str:
        nonlocal window, shown
        window.extend(ids)
        text = decode(window)
        settled = text.rstrip("\ufffd")
        new, shown = settled[len(shown) :], max(shown, settled, key=len)
        if len(window) > _WINDOW and settled == text:
            window = window[-_CONTEXT:]
            shown = decode(window)
        return new

    return decode_more


def write(writer: Writer, prompt: str, samples: int, max_new_tokens: int, sampling: Sampling, seed: int, show) -> None:
    """Writes `samples` continuations of the prompt, one after the other, passing text to `show` as it comes."""
    ids = np.asarray([writer.codec.encode(prompt)], np.int32).reshape(1, -1)
    generator = writer.generator
    sampling = dataclasses.replace(sampling, vocab_size=writer.codec.size)
    state = generator.start(1, max_length=ids.shape[1] + max_new_tokens)
    state = generator.read(state, ids)
    for sample in range(samples):
        if samples > 1:
            show(f"\n--- sample {sample + 1} ---\n")
        show(prompt)
        decode = writer.codec.decoder()
        stream = generator.generate(
            generator.copy(state, [0]), max_new_tokens, sampling, eos_id=writer.codec.eos_id, seeds=seed + sample
        )
        for tokens in stream:
            if tokens[0] != writer.codec.eos_id:
                show(decode([int(tokens[0])]))
        show("\n")


def main(argv: Sequence[str]) -> int:
    """Configures `open_writer` from the command line, reads the prompt and writes."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.generate", description=__doc__)
    parser.add_argument("--model_dir", help="a run folder: its configuration and newest checkpoint")
    parser.add_argument("--prompt", help="the text to continue; read from standard input when not given")
    parser.add_argument("--unconditional", action="store_true", help="write without a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k most likely tokens; 0 from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the nucleus of this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=1)
    arguments = config_lib.parse_arguments(argv, parser)
    options = arguments.options
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    for name in ("max_new_tokens", "num_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: it must be at least 1.")
    from t5x_ssm.generate import open_writer as configured

    config_lib.load_run(arguments, "runs/generate.gin")
    config_lib.set_unless_given(CHECKPOINT_PATH=options.model_dir)
    config_lib.check(configured, *config_lib.training_root())

    prompt = "" if options.unconditional else options.prompt
    if prompt is None:
        piped = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
        prompt = piped.decode("utf-8", errors="surrogateescape").rstrip("\n")
    if not prompt and not options.unconditional:
        raise UserError("The prompt is empty: give --prompt=TEXT or text on standard input, or --unconditional.")

    sys.stdout.reconfigure(errors="surrogateescape")

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    writer = gin.get_configurable(configured)()
    try:
        write(writer, prompt, options.num_samples, options.max_new_tokens, sampling, options.seed, show)
    except BrokenPipeError:
        # Whoever read has read enough, as in `… | head`. Python would flush, and complain, once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    config_lib.run_main(main)
