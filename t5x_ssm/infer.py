"""What a model writes for every example of a seqio task, or how likely it finds their targets.

    python -m t5x_ssm.infer --model_dir=RUN_FOLDER --mode=score --task=embedded_books [--num_examples=100]
    python -m t5x_ssm.infer --gin_file=models/gss_192m.gin --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=… …

With --model_dir the run's own configuration and newest checkpoint are taken. Each task of a mixture becomes a file
`TASK-SPLIT-MODE.jsonl` with one line an example, in the task's order:
  predict  inputs, targets, prediction: what the model writes after the inputs, until EOS
  score    inputs, targets, score: log p(targets | inputs) in nats; tokens: how many; greedy: whether they are what greedy
           decoding would write
The task's own metrics, if it has any, are printed and written beside it, as `TASK-SPLIT-MODE-metrics.json`.
Examples are taken whole, however long, unless --inputs_length and --targets_length cut them: a decoder scores them in windows
and carries the state.

A run of several processes (`launch.local --module=t5x_ssm.infer`, `t5x_ssm.parallel.processes`) deals the batches out to them;
what is written is the same.
"""

import argparse
import collections
import dataclasses
import inspect
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gin
import jax
import numpy as np
from flax import linen as nn

from t5x_ssm import config as config_lib
from t5x_ssm.data import feed as feed_lib
from t5x_ssm.data.examples import Example, TaskExamples, open_examples
from t5x_ssm.errors import UserError
from t5x_ssm.generate import restore_network
from t5x_ssm.inference import beam_search
from t5x_ssm.inference.beam_search import Beams, BeamSearcher
from t5x_ssm.inference.decoding import PAD, DecodeState, Generator, Stream
from t5x_ssm.inference.encoded import PairGenerator, PairScorer
from t5x_ssm.inference.ragged import batches, padded
from t5x_ssm.inference.sampling import Sampling
from t5x_ssm.inference.scoring import DocumentScorer, Scores
from t5x_ssm.models.objectives import SequenceToSequence
from t5x_ssm.parallel import processes
from t5x_ssm.training import consensus, places

MODES = ("predict", "score")
# Tokens drawn between two looks of the host; nobody watches them come.
STEPS_PER_CALL = 16
# Capacities of full attention are multiples of this, so that batches share their executables.
CAPACITY = 512


@dataclasses.dataclass(frozen=True)
class Writing:
    """How predictions are made; the parameters of `infer` of the same names."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    beams: int
    length_penalty: float


def infer(
    *,
    model: Any,
    mixture_or_task_name: str,
    checkpoint_path: str,
    output_dir: str,
    mode: str = "predict",
    split: str = "validation",
    batch_size: int = 8,
    inputs_length: int | None = None,
    targets_length: int | None = None,
    num_examples: int | None = None,
    prompt_length: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    beams: int = 1,
    length_penalty: float | None = None,
) -> int:
    """Runs a model over a task and writes one JSON line an example.

    Args:
      model: the objective, see `models.objectives`.
      mixture_or_task_name: what to read.
      checkpoint_path: a checkpoint or a run folder.
      output_dir: where the files go.
      mode: one of MODES.
      split: of the task.
      batch_size: examples at a time; it changes nothing in the results but rounding.
      inputs_length, targets_length: tokens that each text is cut to; None takes it whole. What is written is compared with
        the whole text.
      num_examples: of each task, from the first; all when None.
      prompt_length: for tasks without inputs: how many tokens of the targets are the prompt, and the rest the targets.
      max_new_tokens: when a prediction ends without EOS.
      temperature, top_k, top_p: see `inference.sampling.Sampling`; greedy by default.
      seed: of the draws; example i draws with seed + i.
      beams: above 1, predictions are the likeliest whole texts that so many beams find.
      length_penalty: of the beams, see `inference.beam_search`; 0.6 when None.

    Returns:
      The exit status, 0.
    """
    if mode not in MODES:
        raise UserError(f"infer.mode = {mode!r}; it is one of {', '.join(MODES)}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("inputs_length", inputs_length, 1),
        ("targets_length", targets_length, 1),
        ("num_examples", num_examples, 1),
        ("prompt_length", prompt_length, 0),
        ("max_new_tokens", max_new_tokens, 1),
        ("beams", beams, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"infer.{name} = {value}; it must be at least {least}.")
    sampling = Sampling(temperature, top_k, top_p)
    writing = Writing(max_new_tokens, sampling, seed, beams, 0.6 if length_penalty is None else length_penalty)
    if beams > 1:
        beam_search.check_settings(beams, writing.length_penalty, sampling)
    elif length_penalty is not None:
        raise UserError(
            f"infer.length_penalty = {length_penalty} has a meaning for beams only: set infer.beams above 1."
        )
    lengths = {"inputs": inputs_length, "targets": targets_length}
    tasks = open_examples(mixture_or_task_name, split, lengths)
    for task in tasks:
        if mode == "predict" and not task.has_inputs and prompt_length is None:
            raise UserError(
                f"Task {task.name!r} has only targets, so there is nothing to predict from: set --prompt_length=N to "
                "continue the first N tokens of each example, or --mode=score."
            )
    restored = restore_network(model, checkpoint_path)
    trained_with = (restored.metadata or {}).get("vocabulary", {}).get("hash")
    for task in tasks:
        feed_lib.check_vocabulary(task.description, embedding_size=model.network.vocab_size, expected_hash=trained_with)
    readers = PairReaders if isinstance(model, SequenceToSequence) else TextReaders
    reader = readers(model.network, restored.params, batch_size)
    folder = places.place(output_dir, "INFER_OUTPUT_DIR")
    for task in tasks:
        examples: Iterable[Example] = itertools.islice(task, num_examples)
        if prompt_length is not None and not task.has_inputs:
            examples = (task.cut(example, prompt_length) for example in examples)
        if mode == "predict":
            lines = predict(reader, task, examples, batch_size, writing)
        else:
            lines = score(reader, examples, batch_size)
        if jax.process_index() == 0:
            write_lines(folder / f"{task.name}-{split}-{mode}.jsonl", lines, task, mode)
        else:
            collections.deque(lines, maxlen=0)  # Process 0 writes this one's share too.
    return 0


class TextReaders:
    """A decoder, which reads inputs as the beginning of its text."""

    def __init__(self, network: nn.Module, params: Any, batch_size: int):
        self._batch_size = batch_size
        self._generator = Generator(network, params)
        self._searcher = BeamSearcher(self._generator)
        self._scorer = DocumentScorer(network, params)

    def write(self, examples: Sequence[Example], limit: int, **settings: Any) -> Stream:
        """The tokens after each example's inputs."""
        return self._generator.generate(self._read(examples, limit), limit, **settings)

    def search(self, examples: Sequence[Example], limit: int, **settings: Any) -> Beams:
        """The likeliest texts after each example's inputs."""
        return self._searcher.search(self._read(examples, limit), limit, **settings)

    def _read(self, examples: Sequence[Example], limit: int) -> DecodeState:
        tokens, lengths = padded([example.inputs for example in examples], self._batch_size)
        capacity = -(-(tokens.shape[1] + limit) // CAPACITY) * CAPACITY
        return self._generator.read(self._generator.start(self._batch_size, capacity), tokens, lengths)

    def score(self, examples: Sequence[Example]) -> Scores:
        """Of each example's targets."""
        tokens, lengths = padded([np.concatenate([e.inputs, e.targets]) for e in examples], self._batch_size)
        prompts, _ = padded([[e.inputs.size] for e in examples], self._batch_size)
        return self._scorer.score(tokens, lengths, prompts[:, 0])


class PairReaders:
    """An encoder-decoder, whose encoder reads the inputs."""

    def __init__(self, network: nn.Module, params: Any, batch_size: int):
        self._batch_size = batch_size
        self._generator = PairGenerator(network, params)
        self._scorer = PairScorer(network, params)

    def write(self, examples: Sequence[Example], limit: int, **settings: Any) -> Stream:
        """As `TextReaders.write`."""
        inputs, _ = padded([example.inputs for example in examples], self._batch_size)
        return self._generator.generate(inputs, limit, **settings)

    def search(self, examples: Sequence[Example], limit: int, **settings: Any) -> Beams:
        """As `TextReaders.search`."""
        inputs, _ = padded([example.inputs for example in examples], self._batch_size)
        return self._generator.search(inputs, limit, **settings)

    def score(self, examples: Sequence[Example]) -> Scores:
        """As `TextReaders.score`."""
        inputs, _ = padded([example.inputs for example in examples], self._batch_size)
        targets, lengths = padded([example.targets for example in examples], self._batch_size)
        return self._scorer.score(inputs, targets, lengths)


Readers = TextReaders | PairReaders


def shared(
    examples: Iterable[Example], batch_size: int, work: Callable[[int, list[Example]], list[dict[str, Any]]]
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Each example with what `work` makes of it, in order and on all processes, among which the batches are dealt out.

    Args:
      examples: the same on all processes.
      batch_size: examples at a time.
      work: from the number of a batch's first example, and the batch, to JSON-able results.
    """
    index, left = jax.process_index(), batches(examples, batch_size)
    while dealt := list(itertools.islice(left, jax.process_count())):
        own = consensus.succeed_together(lambda dealt=dealt: work(*dealt[index]) if index < len(dealt) else [])
        for (_, batch), results in zip(dealt, consensus.gather_json(own), strict=False):
            yield from zip(batch, results, strict=True)


def predict(
    reader: Readers, task: TaskExamples, examples: Iterable[Example], batch_size: int, how: Writing
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Each example with what the network writes for its inputs."""
    eos_id = task.description["eos_id"]
    settings = {"sampling": dataclasses.replace(how.sampling, vocab_size=task.description["size"]), "eos_id": eos_id}

    def write(first: int, batch: list[Example]) -> list[dict[str, Any]]:
        if how.beams > 1:
            found = reader.search(
                batch, how.max_new_tokens, beams=how.beams, length_penalty=how.length_penalty, **settings
            )
            rows = found.tokens[:, 0]
        else:
            seeds = how.seed + first + np.arange(batch_size)
            stream = reader.write(batch, how.max_new_tokens, seeds=seeds, steps_per_call=STEPS_PER_CALL, **settings)
            rows = np.stack(list(stream), axis=1)
        rows = rows[: len(batch)].tolist()
        written = (list(itertools.takewhile(lambda i: i not in (eos_id, PAD), row)) for row in rows)
        return [{"prediction": task.vocabulary.decode(ids)} for ids in written]

    return shared(examples, batch_size, write)


def score(reader: Readers, examples: Iterable[Example], batch_size: int) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Each example with log p(targets | inputs)."""

    def rate(_: int, batch: list[Example]) -> list[dict[str, Any]]:
        result = reader.score(batch)
        columns = zip(result.log_likelihood, result.tokens, result.greedy, strict=True)
        found = [
            {"score": float(nats), "tokens": int(count), "greedy": bool(greedy)} for nats, count, greedy in columns
        ]
        return found[: len(batch)]

    return shared(examples, batch_size, rate)


def write_lines(
    path: places.Place, found: Iterable[tuple[Example, dict[str, Any]]], task: TaskExamples, mode: str
) -> None:
    """Writes one JSON object a line, and the task's metrics; a file has its name only when it is complete. Prints a summary."""
    examples, results, keep = [], [], task.has_metrics(mode)
    count, total, tokens, greedy = 0, 0.0, 0, 0
    metrics = {}
    with places.writing(path.parent, "INFER_OUTPUT_DIR") as folder:
        partial = folder / f"{path.name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            for example, result in found:
                line = {"inputs": example.inputs_text, "targets": example.targets_text, **result}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                if keep:
                    examples.append(example)
                    results.append(result["score" if mode == "score" else "prediction"])
                count += 1
                total += result.get("score", 0.0)
                tokens += result.get("tokens", 0)
                greedy += result.get("greedy", False)
        partial.replace(folder / path.name)
        if examples:
            metrics = task.metrics(examples, results, mode)
            (folder / f"{path.stem}-metrics.json").write_text(json.dumps({"examples": count, **metrics}) + "\n")
    nats = f"  {-total / tokens:.4f} nats/token over {tokens:,} tokens, {greedy / count:.1%} greedy" if tokens else ""
    print(f"{task.name}: {count:,} examples{nats}  written: {path}", flush=True)
    if metrics:
        print(f"{task.name}: {'  '.join(f'{name} {value:.2f}' for name, value in metrics.items())}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Configures `infer` from the command line and runs it."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.infer", description=__doc__.split("\n")[0])
    parser.add_argument("--model_dir", help="a run folder: its configuration and newest checkpoint")
    parser.add_argument("--output_dir", help="where the lines go; MODEL_DIR/inference by default")
    processes.add_flags(parser)
    parser.add_argument("--task", help="a registered seqio task or mixture; that of the training by default")
    # Flags that stand for parameters of `infer`, whose defaults hold without them.
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--split")
    parser.add_argument("--batch_size", type=int, help="examples at a time")
    parser.add_argument("--inputs_length", type=int, help="tokens that inputs are cut to, as in training")
    parser.add_argument("--targets_length", type=int, help="the same of targets")
    parser.add_argument("--num_examples", type=int, help="of each task, from the first")
    parser.add_argument("--prompt_length", type=int, help="tokens of a text without inputs that are its prompt")
    parser.add_argument("--max_new_tokens", type=int, help="when a prediction ends at the latest")
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token")
    parser.add_argument("--top_k", type=int, help="draw from the k most likely tokens; 0 from all")
    parser.add_argument("--top_p", type=float, help="draw from the nucleus of this probability")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--beams", type=int, help="above 1: search with so many beams for the likeliest text")
    parser.add_argument("--length_penalty", type=float, help="of the beams: 0 ranks texts by log p alone")
    arguments = config_lib.parse_arguments(argv, parser)
    options = vars(arguments.options)
    processes.join(arguments.options)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from t5x_ssm.infer import infer as configured

    config_lib.load_run(arguments, "runs/infer.gin")
    folder = options["model_dir"] and os.path.join(options["model_dir"], "inference")
    config_lib.set_unless_given(CHECKPOINT_PATH=options["model_dir"], INFER_OUTPUT_DIR=folder)
    for macro, flag in (("INFER_TASK", "task"), ("INFER_OUTPUT_DIR", "output_dir")):
        if options[flag]:
            gin.bind_parameter(f"{macro}/gin.macro.value", options[flag])
    config_lib.check(configured, *config_lib.training_root())
    parameters = inspect.signature(configured).parameters
    flags = {name: value for name, value in options.items() if name in parameters and value is not None}
    return gin.get_configurable(configured)(**flags)


if __name__ == "__main__":
    config_lib.run_main(main)
