"""Evaluation of a checkpoint on a held-out split, at one or several lengths.

    python -m t5x_ssm.eval --model_dir=RUN_FOLDER [--lengths=512,1024] [--across_documents=1024] [--output_dir=FOLDER]
    python -m t5x_ssm.eval --gin_file=models/gss_192m.gin --gin_file=runs/eval.gin --gin.CHECKPOINT_PATH=… …
    python -m t5x_ssm.eval --model_dir=RUN_FOLDER --gin.EVAL_SPLIT=test      (a classifier, or a model of pairs)

With --model_dir the run's own configuration and newest checkpoint are taken (--gin.CHECKPOINT_PATH=… takes another). Prints
nats per token, perplexity and bits per byte of every task, and writes them to `eval_results.json`, with the loss by the number
of tokens before it. Of a classifier these are loss and accuracy; of a model of inputs and targets, nats per token, perplexity
and accuracy of the targets (`t5x_ssm.infer` tells the task's own metrics, of what the model writes).

Windows run over the ends of documents. As in training, the state is zero where a document begins; with --across_documents it is
carried on, so that a window of length L is L tokens of context however short its documents are.

A run of several processes (`launch.local --module=t5x_ssm.eval`, `t5x_ssm.parallel.processes`) shares every batch out over all their
devices, as training does.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from t5x_ssm import config as config_lib
from t5x_ssm.data import feed as feed_lib
from t5x_ssm.errors import UserError
from t5x_ssm.models.objectives import Classification, cross_entropy
from t5x_ssm.parallel import batch_parts, processes
from t5x_ssm.parallel import mesh as mesh_lib
from t5x_ssm.train import batch_shapes, use_compilation_cache
from t5x_ssm.training import consensus, places, restoring
from t5x_ssm.training.evaluation import sum_over_batches
from t5x_ssm.training.host_memory import keep_freed_memory
from t5x_ssm.training.metrics import summarise_sums
from t5x_ssm.training.sharded_state import abstract_mutables, abstract_parameters
from t5x_ssm.training.train_step import make_eval_step
from t5x_ssm.training.trainer import check_batch

# Points of a curve over positions, evenly spaced on a logarithmic axis.
POINTS = 24


def evaluate(
    *,
    model: Any,
    dataset_cfg: feed_lib.DatasetConfig,
    checkpoint_path: str,
    output_dir: str,
    lengths: Sequence[int] | None = None,
    across_documents: Sequence[int] = (),
    mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(),
) -> int:
    """Evaluates every task of `dataset_cfg` and writes `eval_results.json`.

    Args:
      model: the objective, see `models.objectives`.
      dataset_cfg: the split; its batch size counts tokens: at twice its length, batches have half as many rows. Classifiers,
        encoder-decoders and pairs have one length.
      checkpoint_path: a checkpoint or a run folder.
      output_dir: where the results go.
      lengths: lengths of windows; that of `dataset_cfg` when None.
      across_documents: lengths of windows that are also evaluated as running text, without an end of any document.
      mesh: sizes of the mesh axes.

    Returns:
      The exit status, 0.
    """
    use_compilation_cache()
    keep_freed_memory()
    folder = places.place(output_dir, "EVAL_OUTPUT_DIR")
    device_mesh = mesh_lib.make_mesh(mesh)
    feed_lib.check_config(dataset_cfg, batch_parts.share(device_mesh)[1])
    if dataset_cfg.objective != "language_model" or feed_lib.INPUTS in dataset_cfg.task_feature_lengths:
        if lengths or across_documents:
            raise UserError(
                "A classifier or a model of inputs and targets has the lengths of TASK_FEATURE_LENGTHS; leave out --lengths "
                "and --across_documents."
            )
        path, results = _examples(model, dataset_cfg, checkpoint_path, device_mesh)
        _write(folder, path, dataset_cfg.split, {"tasks": results})
        return 0
    own_length = dataset_cfg.task_feature_lengths[feed_lib.TARGETS]
    tokens = own_length * dataset_cfg.batch_size
    shards = mesh_lib.batch_shards(device_mesh)
    windows = [("lengths", length, dataset_cfg.pack) for length in lengths or (own_length,)]
    windows += [("across_documents", length, False) for length in across_documents]
    for setting, length, _ in windows:
        if length < 1:
            raise UserError(f"evaluate.{setting} has {length}; a window has at least 1 token.")
    # Every process reads the sums, so each has all of them.
    whole = jax.sharding.NamedSharding(device_mesh, jax.sharding.PartitionSpec())
    by_position = jax.jit(lambda params, batch: _sums_by_position(model, params, batch), out_shardings=whole)
    params = None
    tables: dict[str, dict[str, dict[str, Any]]] = {"lengths": {}, "across_documents": {}}
    with jax.set_mesh(device_mesh):
        for kind, length, pack in windows:
            cfg = dataclasses.replace(
                dataset_cfg,
                task_feature_lengths={feed_lib.TARGETS: length},
                batch_size=shards * max(1, tokens // (length * shards)),
                pack=pack,
            )
            shapes = batch_shapes(cfg)
            check_batch(shapes, device_mesh, 1)
            feeds = _open(cfg, device_mesh)
            if params is None:
                restored = restoring.restore_parameters(
                    checkpoint_path, abstract_parameters(model, shapes, device_mesh)
                )
                params = restored.params
                for feed in feeds.values():
                    expected = (restored.metadata or {}).get("vocabulary", {}).get("hash")
                    feed_lib.check_vocabulary(
                        feed.vocabulary, embedding_size=model.network.vocab_size, expected_hash=expected
                    )
            results = tables[kind][str(length)] = {}
            for task, feed in feeds.items():
                sums = _totals(by_position(params, batch_parts.to_global(batch, device_mesh)) for batch in feed)
                results[task] = _summary(sums, feed.num_bytes(), feed.num_words)
                if jax.process_index() == 0:
                    print(_line(task, length, results[task], kind), flush=True)
    _write(folder, restored.path, dataset_cfg.split, tables)
    return 0


def _examples(
    model: Any, cfg: feed_lib.DatasetConfig, checkpoint_path: str, mesh: jax.sharding.Mesh
) -> tuple[places.Place, dict[str, dict[str, float]]]:
    """The checkpoint, and the figures of every task whose examples are classified sequences or pairs."""
    shapes = batch_shapes(cfg)
    check_batch(shapes, mesh, 1)
    feeds = _open(cfg, mesh)
    step = jax.jit(make_eval_step(model))
    results = {}
    with jax.set_mesh(mesh):
        restored = restoring.restore_parameters(checkpoint_path, abstract_parameters(model, shapes, mesh))
        flax_mutables = restoring.restore_mutables(restored.path, abstract_mutables(model, shapes, mesh))
        expected = (restored.metadata or {}).get("vocabulary", {}).get("hash")
        for task, feed in feeds.items():
            feed_lib.check_vocabulary(feed.vocabulary, embedding_size=model.network.vocab_size, expected_hash=expected)
            classes = model.network.num_classes if isinstance(model, Classification) else None
            feed_lib.check_classes(feed.vocabulary, classes)
            batches = (batch_parts.to_global(batch, mesh) for batch in feed)
            sums = sum_over_batches(step, restored.params, batches, flax_mutables)
            # Weights count examples of a classifier, and tokens of a target text.
            counted = "tokens" if classes is None else "examples"
            results[task] = line = {**summarise_sums(sums), counted: int(sums["weights"])}
            if jax.process_index() == 0:
                cost = f"loss {line['loss']:.4f}" if classes else f"{line['nats_per_token']:.4f} nats/token"
                print(f"{task:28} {cost}  accuracy {line['accuracy']:.4f}  {line[counted]:,} {counted}")
    return restored.path, results


def _open(cfg: feed_lib.DatasetConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The feed of every held-out task, on all processes or on none."""
    part, parts = batch_parts.share(mesh)
    place = {"process_index": part, "process_count": parts}
    return consensus.succeed_together(lambda: feed_lib.open_evaluation(cfg, barrier=consensus.barrier, **place))


def _write(folder: places.Place, checkpoint: Any, split: str, tables: dict[str, Any]) -> None:
    """Writes `eval_results.json`, once for all processes."""
    if jax.process_index() > 0:
        return
    with places.reached(folder, "EVAL_OUTPUT_DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "eval_results.json"
        step = checkpoint.name.rpartition("_")[2]
        contents = {"checkpoint": str(checkpoint), "step": step, "split": split, **tables}
        path.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"written: {path}")


def _sums_by_position(model: Any, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Nats, hits and tokens summed over the batch, by the number of tokens of the document before them: each [L]."""
    targets = batch["decoder_target_tokens"]
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    length = targets.shape[1]
    positions = batch.get("decoder_positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length), targets.shape)
    logits = model.logits(params, batch)
    _, nats, _ = cross_entropy(logits, targets)
    values = {"nats": nats, "correct": (jnp.argmax(logits, -1) == targets).astype(jnp.float32), "weights": 1.0}
    return {name: jnp.zeros(length).at[positions].add(value * weights) for name, value in values.items()}


def _totals(batches) -> dict[str, np.ndarray]:
    totals: dict[str, np.ndarray] = {}
    for sums in batches:
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
    return totals


def _summary(sums: dict[str, np.ndarray], num_bytes: int, num_words: int | None = None) -> dict[str, Any]:
    total = {name: float(value.sum()) for name, value in sums.items()}
    result: dict[str, Any] = summarise_sums({**total, "bytes": num_bytes})
    result |= {"tokens": int(total["weights"]), "bytes": num_bytes}
    if num_words:
        # As the papers of PG-19 and WikiText-103 report it, whatever the vocabulary.
        result |= {"words": num_words, "word_perplexity": math.exp(total["nats"] / num_words)}
    bytes_per_token = num_bytes / total["weights"]
    length = len(sums["nats"])
    edges = np.unique([0, *np.round(np.geomspace(min(8, length), length, POINTS)).astype(int)])
    curve: dict[str, list[float]] = {"position": [], "bits_per_byte": []}
    for low, high in itertools.pairwise(edges):
        weight = sums["weights"][low:high].sum()
        if weight:
            curve["position"].append((low + high) / 2)
            curve["bits_per_byte"].append(float(sums["nats"][low:high].sum() / weight / math.log(2) / bytes_per_token))
    result["by_position"] = curve
    return result


def _line(task: str, length: int, result: dict[str, Any], kind: str) -> str:
    words = f"  {result['word_perplexity']:.3f} perplexity per word" if "words" in result else ""
    running = "  across documents" if kind == "across_documents" else ""
    return (
        f"{task:28} length {length:6,}  {result['bits_per_byte']:.4f} bits/byte  {result['nats_per_token']:.4f} nats/token  "
        f"perplexity {result['perplexity']:.3f}  accuracy {result['accuracy']:.3f}  {result['tokens']:,} tokens{words}{running}"
    )


def main(argv: Sequence[str]) -> int:
    """Configures `evaluate` from the command line and runs it."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.eval", description=__doc__)
    parser.add_argument("--model_dir", help="a run folder: its configuration and newest checkpoint")
    processes.add_flags(parser)
    parser.add_argument("--lengths", help="comma-separated window lengths")
    parser.add_argument(
        "--across_documents", help="lengths to evaluate as running text, carrying the state over documents"
    )
    parser.add_argument("--output_dir", help="where eval_results.json goes; MODEL_DIR/evaluation by default")
    arguments = config_lib.parse_arguments(argv, parser)
    options = arguments.options
    processes.join(options)
    from t5x_ssm.eval import evaluate as configured

    config_lib.load_run(arguments, "runs/eval.gin")
    folder = options.model_dir and os.path.join(options.model_dir, "evaluation")
    config_lib.set_unless_given(CHECKPOINT_PATH=options.model_dir, EVAL_OUTPUT_DIR=folder)
    if options.output_dir:
        gin.bind_parameter("EVAL_OUTPUT_DIR/gin.macro.value", options.output_dir)
    if options.lengths:
        gin.bind_parameter("EVAL_LENGTHS/gin.macro.value", _lengths("lengths", options.lengths))
    config_lib.check(configured, *config_lib.training_root())
    across = {}
    if options.across_documents:
        across["across_documents"] = _lengths("across_documents", options.across_documents)
    logging.info("Evaluating %s", gin.query_parameter("CHECKPOINT_PATH/gin.macro.value"))
    return gin.get_configurable(configured)(**across)


def _lengths(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--{flag}={text}: give positive integers, separated by commas.") from None


if __name__ == "__main__":
    config_lib.run_main(main)
