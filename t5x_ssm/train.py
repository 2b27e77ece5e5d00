"""Pretraining: `python -m t5x_ssm.train --gin_file=quickstart.gin --gin.MODEL_DIR=runs/first`.

Start it again with the same command and it goes on from the newest checkpoint. SIGTERM and Ctrl-C finish the step, save,
and leave with status 0. A run of several processes is the same command in each, see `t5x_ssm.parallel.processes`.
"""

import argparse
import functools
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np

from t5x_ssm import config as config_lib
from t5x_ssm.data import feed as feed_lib
from t5x_ssm.data.classification import feature_shapes
from t5x_ssm.data.evaluation_feeds import EvaluationFeed
from t5x_ssm.errors import CheckpointError, UserError
from t5x_ssm.models.objectives import Classification
from t5x_ssm.parallel import batch_parts, processes
from t5x_ssm.parallel import mesh as mesh_lib
from t5x_ssm.training import (
    checkpoints,
    consensus,
    folder_lock,
    host_memory,
    places,
    preemption,
    restoring,
    run_folder,
)
from t5x_ssm.training import goodput as goodput_lib
from t5x_ssm.training import trainer as trainer_lib
from t5x_ssm.training.metrics import MetricsLog
from t5x_ssm.training.optimizers import Optimizer
from t5x_ssm.training.sharded_state import parameter_table
from t5x_ssm.training.spool import Spool

METRICS_FILE = "metrics.jsonl"
# What a start goes on with of what an earlier one wrote, beside checkpoints.
GROWING_FILES = (METRICS_FILE, f"{METRICS_FILE}.unreadable", goodput_lib.FILE)
# What may differ between two starts of one run: how long, how often, where; not what is learnt.
NOT_PART_OF_A_RUN = (
    "train.total_steps",
    "schedules.*.total_steps",
    "train.model_dir",
    "train.eval_*",
    "train.train_eval_dataset_cfg",
    "train_eval/*",
    "checkpoints.*",
    "feed.DatasetConfig.cache_dir",
    "*/feed.DatasetConfig.cache_dir",
    "*/settings._location.path",  # That it is the same data, the feed's position says; that of the vocabulary, its hash.
    "settings._vocabulary.name",
    "mesh.MeshConfig.*",
    "trainer.TrainerConfig.log_period",
    "trainer.TrainerConfig.max_skipped_in_a_row",
    "trainer.TrainerConfig.profile_*",
    "trainer.TrainerConfig.stall_seconds",
    "trainer.TrainerConfig.tensorboard",
)


def train(
    *,
    model: Any,
    optimizer: Optimizer,
    train_dataset_cfg: feed_lib.DatasetConfig,
    checkpoint_cfg: checkpoints.CheckpointConfig,
    model_dir: str,
    total_steps: int,
    train_eval_dataset_cfg: feed_lib.DatasetConfig | None = None,
    eval_steps: int | None = None,
    eval_period: int = 1000,
    random_seed: int = 0,
    mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig(),
    trainer: trainer_lib.TrainerConfig = trainer_lib.TrainerConfig(),
) -> int:
    """Trains `model` and keeps everything about the run in `model_dir`.

    Args:
      model: the objective, see `models.objectives`.
      optimizer: see `training.optimizers`.
      train_dataset_cfg: training data.
      checkpoint_cfg: when to save and what to start from.
      model_dir: run folder, of a file system or `gs://bucket/folder`: checkpoints, `config.gin`, `model-info.txt`,
        `metrics.jsonl`, event files.
      total_steps: steps in all, those of earlier starts included.
      train_eval_dataset_cfg: held-out data, or None.
      eval_steps: batches of an evaluation; the whole split when None.
      eval_period: steps between evaluations; 0 evaluates only at the end.
      random_seed: of initial parameters, dropout and data order.
      mesh: sizes of the mesh axes.
      trainer: settings of the loop.

    Returns:
      The exit status, 0.
    """
    use_compilation_cache()
    host_memory.keep_freed_memory()
    check_counts(total_steps, eval_steps, eval_period)
    folder = places.place(model_dir, "MODEL_DIR")
    main = jax.process_index() == 0
    device_mesh = mesh_lib.make_mesh(mesh)
    description = config_lib.description(NOT_PART_OF_A_RUN)
    with (
        preemption.StopRequest() as stop,
        folder_lock.locked(folder, lambda: run_folder.check_run_folder(folder, description)) as check_lock,
        consensus.succeed_together(lambda: Spool(folder, GROWING_FILES, check_lock, enabled=main)) as spool,
        goodput_lib.Goodput(spool.folder if main else None) as goodput,
    ):
        part, parts = batch_parts.share(device_mesh)
        feed = consensus.succeed_together(
            lambda: feed_lib.open_feed(
                train_dataset_cfg,
                process_index=part,
                process_count=parts,
                seed=random_seed,
                barrier=consensus.barrier,
            )
        )
        feed_lib.check_vocabulary(feed.vocabulary, embedding_size=model.network.vocab_size)
        classes = model.network.num_classes if isinstance(model, Classification) else None
        feed_lib.check_classes(feed.vocabulary, classes)
        run = trainer_lib.Trainer(
            model, optimizer, device_mesh, batch_shapes(train_dataset_cfg), seed=random_seed, config=trainer
        )
        evaluations = []
        if train_eval_dataset_cfg is not None:
            trainer_lib.check_batch(batch_shapes(train_eval_dataset_cfg), device_mesh, 1)
            evaluations = evaluations_of(train_eval_dataset_cfg, eval_steps, feed.vocabulary, device_mesh)

        checkpointer = checkpoints.Checkpointer(folder, checkpoint_cfg.save)
        loop = trainer_lib.LoopState()
        with goodput.spent_on("checkpoint"):
            restored = checkpointer.restore(run.abstract_state.to_tree())
        if restored is not None:
            feed_lib.check_vocabulary(feed.vocabulary, expected_hash=restored.metadata["vocabulary"]["hash"])
            state = run.abstract_state.from_tree(restored.tree)
            feed.restore(data_position(feed, restored))
            loop.restore(restored.metadata["loop"])
            first_step = restored.step
        else:
            state = start(run, checkpoint_cfg.restore, feed.vocabulary)
            first_step = int(state.step)

        if main:
            write_summary(folder, run, optimizer)
        if first_step:
            logging.info("Continuing %s from step %d of %d.", folder, first_step, total_steps)
        log = None
        if main:
            events = spool.folder if trainer.tensorboard else None
            log = MetricsLog(spool.folder / METRICS_FILE, resume_step=first_step, tensorboard_dir=events)

        def save(step, state, dataset_state, loop_state):
            if places.is_store(folder):
                # The history up to here must be there before the checkpoint that goes on from it.
                consensus.ask_first(spool.upload)
            metadata = {
                "loop": loop_state,
                "vocabulary": feed.vocabulary,
                "mesh": dict(device_mesh.shape),
                "jax": jax.__version__,
            }
            checkpointer.save(step, state.to_tree(), dataset_state, metadata)

        try:
            state, step, stopped_by = trainer_lib.fit(
                run,
                state,
                feed,
                loop,
                first_step=first_step,
                total_steps=total_steps,
                model_dir=folder,
                log=log,
                save=save,
                save_due=checkpointer.due,
                evaluations=evaluations,
                eval_period=eval_period,
                bytes_per_token=getattr(feed, "bytes_per_token", None),
                check_saves=checkpointer.check,
                stop=stop,
                goodput=goodput,
            )
            with goodput.spent_on("checkpoint"):
                checkpointer.wait()
            goodput.keep(step)
            if log is not None and step > first_step:
                log.write(step, goodput.summary(), split="goodput")
                logging.info("%s", goodput.text())
        except BaseException:
            if jax.process_count() == 1:  # Otherwise the rest may be gone, and would be waited for.
                close_quietly(checkpointer)
            raise
        else:
            checkpointer.close()
        finally:
            feed.close()
            if log is not None:
                log.close()
    if stopped_by:
        logging.info("%s at step %d: saved. Start the same command again to go on from there.", stopped_by, step)
    elif step > first_step:
        logging.info("Done: step %d, %s.", step, folder)
    else:
        logging.info("%s has already reached step %d of %d; nothing to do.", folder, step, total_steps)
    return 0


def start(run: trainer_lib.Trainer, restore: checkpoints.RestoreCheckpointConfig, vocabulary: Mapping[str, Any]) -> Any:
    """The train state of a new run: from scratch, or from another run's parameters or state.

    Raises:
      DataError: the data's vocabulary is not the one that the parameters were trained with, and all of them are taken.
    """
    if restore.path and restore.what == "state":
        whole = restoring.restore_state(restore, run.abstract_state.to_tree())
        check_trained_with(vocabulary, whole.metadata)
        return run.abstract_state.from_tree(whole.tree)
    state = run.initial_state()
    if not restore.path:
        return state
    found = restoring.restore_parameters(restore, run.abstract_state.params, initial_params=state.params)
    if not restore.assignment_map and not restore.fallback_to_scratch:  # Else the embedding may be a new one.
        check_trained_with(vocabulary, found.metadata)
    return state.replace(params=found.params)


def check_trained_with(vocabulary: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> None:
    """Raises DataError if a checkpoint's metadata name another vocabulary; T5X's checkpoints have none (None)."""
    feed_lib.check_vocabulary(vocabulary, expected_hash=(metadata or {}).get("vocabulary", {}).get("hash"))


def check_counts(total_steps: int, eval_steps: int | None, eval_period: int) -> None:
    """Raises UserError for counts that no run can have."""
    for name, value, least in (("TRAIN_STEPS", total_steps, 1), ("EVAL_PERIOD", eval_period, 0)):
        if value < least:
            raise UserError(f"{name} = {value}; it must be at least {least}.")
    if eval_steps is not None and eval_steps < 1:
        raise UserError(f"EVAL_STEPS = {eval_steps}; it must be at least 1, or None for the whole split.")


def data_position(feed: Any, restored: checkpoints.Restored) -> dict[str, Any]:
    """The position in the data that a checkpoint goes on from."""
    if restored.dataset_state is not None:
        return restored.dataset_state
    if feed.identity["kind"] == "indexed":  # Of these the step says everything.
        return {**feed.identity, "step": restored.step}
    raise UserError(
        f"The checkpoint of step {restored.step} was saved without its position in the data "
        "(SaveCheckpointConfig.save_dataset=False), and a live seqio pipeline cannot go on without. Start a new run from "
        "its parameters (RestoreCheckpointConfig.path), or train from the token cache (DatasetConfig.source='cache')."
    )


def close_quietly(checkpointer: checkpoints.Checkpointer) -> None:
    """Closes without hiding the error, if any, that ended training."""
    try:
        checkpointer.close()
    except CheckpointError as e:
        logging.error("%s", e)


def batch_shapes(cfg: feed_lib.DatasetConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a global batch: the features of seqio's decoder or encoder-decoder feature converter, or those of
    `objectives.Classification`."""
    if cfg.objective == feed_lib.CLASSIFICATION:
        pairs = feed_lib.INPUTS_2 in cfg.task_feature_lengths
        shapes = feature_shapes(cfg.batch_size, cfg.task_feature_lengths[feed_lib.INPUTS], pairs=pairs)
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
    names = ["decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"]
    if cfg.pack:
        names += ["decoder_segment_ids", "decoder_positions"]
    length = cfg.task_feature_lengths[feed_lib.TARGETS]
    if cfg.objective == "language_model":  # A decoder reads inputs, if there are any, as the beginning of its text.
        length += cfg.task_feature_lengths.get(feed_lib.INPUTS, 0)
    lengths = dict.fromkeys(names, length)
    if cfg.objective != "language_model":
        names = ["encoder_input_tokens", *(["encoder_segment_ids", "encoder_positions"] if cfg.pack else [])]
        lengths |= {name: cfg.task_feature_lengths[feed_lib.INPUTS] for name in names}
    return {name: jax.ShapeDtypeStruct((cfg.batch_size, length), np.int32) for name, length in lengths.items()}


def evaluations_of(
    cfg: feed_lib.DatasetConfig, eval_steps: int | None, vocabulary: dict[str, Any], device_mesh: jax.sharding.Mesh
) -> list[trainer_lib.Evaluation]:
    """The held-out tasks of `cfg`, of the training data's vocabulary, each limited to `eval_steps` batches."""
    part, parts = batch_parts.share(device_mesh)
    held_out = consensus.succeed_together(
        lambda: feed_lib.open_evaluation(cfg, process_index=part, process_count=parts, barrier=consensus.barrier)
    )
    evaluations = []
    for task, task_feed in held_out.items():
        if task_feed.vocabulary["hash"] != vocabulary["hash"]:
            raise UserError(
                f"The held-out task {task} has another vocabulary ({task_feed.vocabulary['name']}) than the training data "
                f"({vocabulary['name']}); evaluate on a task of the same one (train_eval/DatasetConfig)."
            )
        count = min(len(task_feed), eval_steps or len(task_feed))
        batches = functools.partial(itertools.islice, task_feed, count)
        # Only of a stream of text the targets are the text, and have bits per byte.
        is_text = isinstance(task_feed, EvaluationFeed)
        bytes_per_token = task_feed.num_bytes(count) / task_feed.num_tokens(count) if is_text else None
        evaluations.append(trainer_lib.Evaluation(f"{cfg.split}/{task}", batches, bytes_per_token))
    return evaluations


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a restart begins at once. JAX_COMPILATION_CACHE_DIR moves them."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "t5x_ssm", "xla"))


def write_summary(folder: places.Place, run: trainer_lib.Trainer, optimizer: Optimizer) -> None:
    """Writes `config.gin` and `model-info.txt`, and prints the parameter groups."""
    params = run.abstract_state.params
    groups = optimizer.group_table(params)
    shape = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    with places.reached(folder, "MODEL_DIR"):
        (folder / "config.gin").write_text(config_lib.operative_text())
        (folder / "model-info.txt").write_text(f"mesh: {shape}\n\n{parameter_table(params)}\n\n{groups}\n")
    logging.info("%s", groups)


def main(argv: Sequence[str]) -> int:
    """Configures `train` from the command line and runs it."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.train", description=__doc__)
    processes.add_flags(parser)
    arguments = config_lib.parse_arguments(argv, parser)
    processes.join(arguments.options)
    config_lib.load(arguments.gin_files, arguments.bindings, arguments.search_paths)
    # Run as a script this file is __main__; gin files configure its twin, t5x_ssm.train.
    from t5x_ssm.train import train as configured

    config_lib.check(configured)
    return gin.get_configurable(configured)()


if __name__ == "__main__":
    config_lib.run_main(main)
