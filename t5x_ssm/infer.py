"""What a model writes for every example of a seqio task, or how likely it finds their targets.

    python -m t5x_ssm.infer --model_dir=RUN_FOLDER --mode=score --task=embedded_books [--num_examples=100]
    python -m t5x_ssm.infer --gin_file=models/gss_192m.gin --gin_file=runs/infer.gin --gin.CHECKPOINT_PATH=… …

With --model_dir the run's own configuration and newest checkpoint are taken. Each task of a mixture becomes a file
`TASK-SPLIT-MODE.jsonl` with one line an example, in the task's order:
  predict  inputs, targets, prediction: what the model writes after the inputs, until EOS
  score    inputs, targets, score: log p(targets | inputs) in nats; tokens: how many; greedy: whether they are what greedy
           decoding would write
Examples are taken whole, however long: scoring reads them in windows and carries the state.
"""

import argparse
import dataclasses
import inspect
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np

from t5x_ssm import config as config_lib
from t5x_ssm.data import feed as feed_lib
from t5x_ssm.data.examples import Example, TaskExamples, open_examples
from t5x_ssm.errors import UserError
from t5x_ssm.generate import restore_network
from t5x_ssm.inference.decoding import PAD, Generator
from t5x_ssm.inference.ragged import batches, padded
from t5x_ssm.inference.sampling import Sampling
from t5x_ssm.inference.scoring import DocumentScorer
from t5x_ssm.training import run_folder

MODES = ("predict", "score")
# Tokens drawn between two looks of the host; nobody watches them come.
STEPS_PER_CALL = 16
# Capacities of full attention are multiples of this, so that batches share their executables.
CAPACITY = 512


def infer(
    *,
    model: Any,
    mixture_or_task_name: str,
    checkpoint_path: str,
    output_dir: str,
    mode: str = "predict",
    split: str = "validation",
    batch_size: int = 8,
    task_feature_lengths: Mapping[str, int] | None = None,
    num_examples: int | None = None,
    prompt_length: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
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
      task_feature_lengths: tokens that features are cut to; None takes them whole.
      num_examples: of each task, from the first; all when None.
      prompt_length: for tasks without inputs: how many tokens of the targets are the prompt, and the rest the targets.
      max_new_tokens: when a prediction ends without EOS.
      temperature, top_k, top_p: see `inference.sampling.Sampling`; greedy by default.
      seed: of the draws; example i draws with seed + i.

    Returns:
      The exit status, 0.
    """
    if mode not in MODES:
        raise UserError(f"infer.mode = {mode!r}; it is one of {', '.join(MODES)}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_examples", num_examples, 1),
        ("prompt_length", prompt_length, 0),
        ("max_new_tokens", max_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"infer.{name} = {value}; it must be at least {least}.")
    sampling = Sampling(temperature, top_k, top_p)
    tasks = open_examples(mixture_or_task_name, split, task_feature_lengths)
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
    generator = Generator(model.network, restored.params)
    scorer = DocumentScorer(model.network, restored.params)
    folder = run_folder.local("INFER_OUTPUT_DIR", output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        examples: Iterable[Example] = itertools.islice(task, num_examples)
        if prompt_length is not None and not task.has_inputs:
            examples = (task.cut(example, prompt_length) for example in examples)
        if mode == "predict":
            settings = dataclasses.replace(sampling, vocab_size=task.description["size"])
            lines = predict(generator, task, examples, batch_size, max_new_tokens, settings, seed)
        else:
            lines = score(scorer, examples, batch_size)
        write_lines(folder / f"{task.name}-{split}-{mode}.jsonl", lines, task.name)
    return 0


def predict(
    generator: Generator,
    task: TaskExamples,
    examples: Iterable[Example],
    batch_size: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """What the network writes after each example's inputs."""
    eos_id = task.description["eos_id"]
    for first, batch in batches(examples, batch_size):
        tokens, lengths = padded([example.inputs for example in batch], batch_size)
        capacity = -(-(tokens.shape[1] + max_new_tokens) // CAPACITY) * CAPACITY
        state = generator.read(generator.start(batch_size, capacity), tokens, lengths)
        seeds = seed + first + np.arange(batch_size)
        stream = generator.generate(
            state, max_new_tokens, sampling, eos_id=eos_id, seeds=seeds, steps_per_call=STEPS_PER_CALL
        )
        written = np.stack(list(stream), axis=1)
        for example, row in zip(batch, written, strict=False):
            ids = list(itertools.takewhile(lambda i: i not in (eos_id, PAD), row.tolist()))
            yield _line(example) | {"prediction": task.vocabulary.decode(ids)}


def score(scorer: DocumentScorer, examples: Iterable[Example], batch_size: int) -> Iterator[dict[str, Any]]:
    """log p(targets | inputs) of each example."""
    for _, batch in batches(examples, batch_size):
        tokens, lengths = padded([np.concatenate([e.inputs, e.targets]) for e in batch], batch_size)
        prompts = np.zeros(batch_size, np.int64)
        prompts[: len(batch)] = [e.inputs.size for e in batch]
        result = scorer.score(tokens, lengths, prompts)
        for i, example in enumerate(batch):
            yield _line(example) | {
                "score": float(result.log_likelihood[i]),
                "tokens": int(result.tokens[i]),
                "greedy": bool(result.greedy[i]),
            }


def write_lines(path: pathlib.Path, lines: Iterable[dict[str, Any]], name: str) -> None:
    """Writes one JSON object a line; the file has its name only when it is complete. Prints a summary."""
    partial = path.with_name(path.name + ".partial")
    count, total, tokens, greedy = 0, 0.0, 0, 0
    with partial.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            count += 1
            total += line.get("score", 0.0)
            tokens += line.get("tokens", 0)
            greedy += line.get("greedy", False)
    partial.replace(path)
    nats = f"  {-total / tokens:.4f} nats/token over {tokens:,} tokens, {greedy / count:.1%} greedy" if tokens else ""
    print(f"{name}: {count:,} examples{nats}  written: {path}", flush=True)


def _line(example: Example) -> dict[str, Any]:
    return {"inputs": example.inputs_text, "targets": example.targets_text}


def main(argv: Sequence[str]) -> int:
    """Configures `infer` from the command line and runs it."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.infer", description=__doc__.split("\n")[0])
    parser.add_argument("--model_dir", help="a run folder: its configuration and newest checkpoint")
    parser.add_argument("--output_dir", help="where the lines go; MODEL_DIR/inference by default")
    parser.add_argument("--task", help="a registered seqio task or mixture; that of the training by default")
    # Flags that stand for parameters of `infer`, whose defaults hold without them.
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--split")
    for name in ("batch_size", "num_examples", "prompt_length", "max_new_tokens", "top_k", "seed"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("temperature", "top_p"):
        parser.add_argument(f"--{name}", type=float)
    arguments = config_lib.parse_arguments(argv, parser)
    options = vars(arguments.options)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from t5x_ssm.infer import infer as configured

    config_lib.load_run(arguments, "runs/infer.gin")
    folder = options["model_dir"] and str(pathlib.Path(options["model_dir"]) / "inference")
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
