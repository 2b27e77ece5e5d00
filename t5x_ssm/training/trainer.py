"""The training loop: batches in, steps, metrics, evaluations, checkpoints, and a clean way out at any step.

What the loop itself remembers between steps (the open window of metrics, how many steps in a row were skipped, where the
data stands) is saved with every checkpoint, so that a run killed anywhere continues as if nothing had happened.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5x_ssm.errors import UserError
from t5x_ssm.parallel import batch_parts, chips
from t5x_ssm.parallel import mesh as mesh_lib
from t5x_ssm.training import places
from t5x_ssm.training.evaluation import sum_over_batches
from t5x_ssm.training.goodput import Goodput, device_figures
from t5x_ssm.training.metrics import MetricQueue, MetricsLog, MetricWindow, summarise_sums
from t5x_ssm.training.optimizers import Optimizer
from t5x_ssm.training.preemption import StopRequest
from t5x_ssm.training.progress import Progress
from t5x_ssm.training.sharded_state import abstract_state, initial_state
from t5x_ssm.training.train_state import TrainState
from t5x_ssm.training.train_step import make_eval_step, make_train_step
from t5x_ssm.training.watchdog import Watchdog

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How the loop runs; nothing here changes what is learnt but `num_microbatches`, by rounding.

    Attributes:
      num_microbatches: parts that a batch is cut into, one in memory at a time. Batch norms see a part alone, so that of
        classifiers that have them it changes more than rounding.
      log_period: steps between lines of `metrics.jsonl`; a line speaks of all steps since the last.
      max_skipped_in_a_row: steps whose loss or gradient is not finite are skipped; at so many in a row training stops,
        with the last batch saved for inspection.
      profile_at_step: step at which a profile is taken into MODEL_DIR/profile; never when None.
      profile_steps: steps in the profile.
      tensorboard: write event files beside `metrics.jsonl`.
      stall_seconds: when no step, batch of an evaluation or checkpoint is done for so long, the process prints where its
        threads are and ends with status 75. Compiling the first step counts. None waits for ever.
    """

    num_microbatches: int = 1
    log_period: int = 10
    max_skipped_in_a_row: int = 10
    profile_at_step: int | None = None
    profile_steps: int = 5
    tensorboard: bool = True
    stall_seconds: float | None = 1800.0

    def __post_init__(self):
        for name in ("num_microbatches", "log_period", "max_skipped_in_a_row", "profile_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"TrainerConfig.{name} = {getattr(self, name)}; it must be at least 1.")
        if self.stall_seconds is not None and self.stall_seconds <= 0:
            raise UserError(f"TrainerConfig.stall_seconds = {self.stall_seconds}; it must be above 0, or None.")


@dataclasses.dataclass
class Evaluation:
    """A held-out set that the loop measures now and then.

    Attributes:
      name: its curves' name.
      batches: makes the host-local batches, from the first on each call.
      bytes_per_token: of this set, for bits per byte.
    """

    name: str
    batches: Callable[[], Iterable[Batch]]
    bytes_per_token: float | None = None


class Trainer:
    """Compiled steps for one objective on one mesh, and the loop over them."""

    def __init__(
        self,
        objective: Any,
        optimizer: Optimizer,
        mesh: Mesh,
        batch_shapes: dict[str, jax.ShapeDtypeStruct],
        *,
        seed: int = 0,
        config: TrainerConfig = TrainerConfig(),
    ):
        """Prepares shardings and jitted functions; nothing is compiled or allocated yet.

        Args:
          objective: what to minimize, see `models.objectives`.
          optimizer: see `training.optimizers`.
          mesh: the device mesh.
          batch_shapes: shapes and types of a global batch.
          seed: of initial parameters and dropout.
          config: see `TrainerConfig`.

        Raises:
          UserError: the mesh or the microbatches do not divide the batch.
        """
        check_batch(batch_shapes, mesh, config.num_microbatches)
        self.mesh, self.config, self.batch_shapes = mesh, config, batch_shapes
        self.objective, self.optimizer = objective, optimizer
        self._init_rng, dropout_rng = jax.random.split(jax.random.key(seed))
        with jax.set_mesh(mesh):
            self.abstract_state = abstract_state(objective, optimizer, batch_shapes, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        step = make_train_step(
            objective,
            optimizer,
            num_microbatches=config.num_microbatches,
            rng=dropout_rng,
            param_shardings=shardings.params,
        )
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self.eval_step = jax.jit(make_eval_step(objective))

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        with jax.set_mesh(self.mesh):
            return initial_state(self.objective, self.optimizer, self.batch_shapes, self.abstract_state, self._init_rng)

    def to_device(self, batch: Batch) -> dict[str, jax.Array]:
        """Global arrays of every feature from the rows of this process, see `batch_parts.share`."""
        return batch_parts.to_global(batch, self.mesh)

    def evaluate(self, state: TrainState, evaluation: Evaluation) -> dict[str, float]:
        """Loss and its relatives over a held-out set, see `metrics.summarise_sums`."""
        with jax.set_mesh(self.mesh):
            batches = (self.to_device(batch) for batch in evaluation.batches())
            sums = sum_over_batches(self.eval_step, state.params, batches, state.flax_mutables)
            return summarise_sums(sums, evaluation.bytes_per_token)


def check_batch(batch_shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh, num_microbatches: int) -> None:
    """Raises UserError when the batch cannot be split over the mesh and the microbatches."""
    first = next(iter(batch_shapes.values())).shape  # [batch, …, length]
    batch, length = first[0], first[-1]
    shards = mesh_lib.batch_shards(mesh)
    if batch % (shards * num_microbatches):
        raise UserError(
            f"BATCH_SIZE = {batch} must be a multiple of {shards * num_microbatches}: data x fsdp = {shards} shards of the "
            f"mesh times num_microbatches = {num_microbatches}."
        )
    if length % mesh.shape["sequence"]:
        raise UserError(
            f"The sequence length {length} must be a multiple of the mesh's sequence axis, {mesh.shape['sequence']}."
        )


class LoopState:
    """What the loop knows beside the train state; saved with every checkpoint."""

    def __init__(self):
        self.window = MetricWindow()
        self.skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """JSON-able; `restore` of it goes on exactly."""
        return {"window": self.window.state(), "skipped_in_a_row": self.skipped_in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        self.window.restore(state["window"])
        self.skipped_in_a_row = state["skipped_in_a_row"]


def fit(
    trainer: Trainer,
    state: TrainState,
    feed: Any,
    loop: LoopState,
    *,
    first_step: int,
    total_steps: int,
    model_dir: places.Place,
    log: MetricsLog | None,
    save: Callable[[int, TrainState, dict[str, Any], dict[str, Any]], None],
    save_due: Callable[[int], bool],
    evaluations: Iterable[Evaluation] = (),
    eval_period: int = 0,
    bytes_per_token: float | None = None,
    check_saves: Callable[[], None] = lambda: None,
    stop: StopRequest | None = None,
    goodput: Goodput | None = None,
) -> tuple[TrainState, int, str]:
    """Trains from `first_step` to `total_steps`, or until asked to stop.

    Everything about step s (its line of metrics, its evaluation) is written before the checkpoint of step s is begun, so
    that what a checkpoint leaves behind is never missing and never there twice.

    Args:
      trainer: the compiled steps.
      state: the state at `first_step`; donated.
      feed: gives the batch of `first_step` next; its `counts` go into the history as 'data/…'.
      loop: its window and counters; updated.
      first_step: steps already taken.
      total_steps: step to end at.
      model_dir: run folder, for profiles and bad batches.
      log: history; None on processes that write none.
      save: called with (step, state, feed state, loop state).
      save_due: whether a step is to be saved.
      evaluations: held-out sets.
      eval_period: steps between evaluations; 0 evaluates only at the end.
      bytes_per_token: of the training text.
      check_saves: called at every step; raises when a save in the background has failed.
      stop: the request to stop, already entered where start-up and the last save should be covered as well.
      goodput: counts the wall time of the run.

    Returns:
      (state, step, reason): reason is '' at the end of training, or the name of the signal that ended it early.

    Raises:
      UserError: too many steps in a row had no finite loss.
    """
    config = trainer.config
    queue = MetricQueue()
    profile = contextlib.ExitStack()
    goodput = goodput or Goodput(None)
    watchdog = Watchdog(config.stall_seconds, "TrainerConfig.stall_seconds")
    evaluations = [dataclasses.replace(e, batches=lambda e=e: _beating(e.batches(), watchdog)) for e in evaluations]
    device = jax.devices()[0]
    figures = {
        "devices": jax.device_count(),
        "flops_per_token": 6.0 * sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "peak_flops": chips.peak_flops(device.device_kind),
    }
    main = jax.process_index() == 0
    progress = Progress(total_steps, first_step, bytes_per_token=bytes_per_token, enabled=main)
    step = first_step

    def observe(ready) -> None:
        for at, values, (times, batch, counts) in ready:
            loop.window.add(values, times)
            progress.update(at, values)
            loop.skipped_in_a_row = loop.skipped_in_a_row + 1 if values["skipped"] else 0
            if loop.skipped_in_a_row >= config.max_skipped_in_a_row:
                _stop_for_bad_loss(model_dir, at, batch, loop.skipped_in_a_row)
            if at % config.log_period == 0 or at == total_steps:
                line = loop.window.close(bytes_per_token)
                if log is not None:
                    log.write(at, line | counts | device_figures(line, **figures) | goodput.summary())
                goodput.keep(at)

    with contextlib.ExitStack() as context:
        context.enter_context(jax.set_mesh(trainer.mesh))
        stop = stop or context.enter_context(StopRequest())
        context.enter_context(watchdog)
        try:
            mark = time.perf_counter()
            while step < total_steps:
                if step == config.profile_at_step:
                    profile.enter_context(_trace(model_dir / "profile"))
                goodput.stepping(step + 1)
                began = time.perf_counter()
                with goodput.spent_on("data"):
                    batch = feed.next()
                waited = time.perf_counter() - began
                state, metrics = trainer.train_step(state, trainer.to_device(batch))
                step += 1
                watchdog.beat()
                stop.hold()  # Until here nothing would be lost, and compiling may take longer than a request can wait.
                check_saves()
                now = time.perf_counter()
                times = {"step": now - mark, "data": waited}
                mark = now
                counts = {f"data/{name}": count for name, count in feed.counts.items()}
                observe(queue.push(step, metrics, (times, batch, counts)))
                if config.profile_at_step is not None and step == config.profile_at_step + config.profile_steps:
                    jax.block_until_ready(state)
                    profile.close()

                ends = step == total_steps
                if evaluations and (ends or (eval_period and step % eval_period == 0)):
                    observe(queue.drain())
                    for evaluation in evaluations:
                        with goodput.spent_on("evaluation"):
                            line = trainer.evaluate(state, evaluation)
                        if log is not None:
                            log.write(step, line, split=evaluation.name)
                        progress.message(f"step {step:,}  {evaluation.name}: {_describe(line)}")
                    mark = time.perf_counter()
                stopping = stop.agreed()
                if ends or stopping or save_due(step):
                    observe(queue.drain())
                    if log is not None:
                        log.sync()
                    with goodput.spent_on("checkpoint"):
                        save(step, state, feed.state(), loop.state())
                    watchdog.beat()
                    mark = time.perf_counter()
                if stopping and not ends:
                    return state, step, stop.signal_name or "A request to another process"
        finally:
            profile.close()
            progress.close()
    return state, step, ""


@contextlib.contextmanager
def _trace(folder: places.Place) -> Iterator[None]:
    """A profile of what happens inside, in `folder`."""
    with places.writing(folder, "MODEL_DIR") as local:
        jax.profiler.start_trace(str(local))
        try:
            yield
        finally:
            jax.profiler.stop_trace()


def _beating(batches: Iterable[Batch], watchdog: Watchdog) -> Iterator[Batch]:
    for batch in batches:
        watchdog.beat()
        yield batch


def _describe(line: Mapping[str, float]) -> str:
    if "bits_per_byte" in line:
        return f"{line['bits_per_byte']:.4f} bits/byte"
    if "nats_per_token" in line:
        return f"{line['nats_per_token']:.4f} nats/token"
    return f"loss {line.get('loss', float('nan')):.4f}, accuracy {line.get('accuracy', float('nan')):.4f}"


def _stop_for_bad_loss(model_dir: places.Place, step: int, batch: Batch, count: int) -> None:
    name = f"step_{step}_process_{jax.process_index()}.npz"
    with places.writing(model_dir / "bad_batches", "MODEL_DIR") as folder:
        np.savez(folder / name, **batch)
    raise UserError(
        f"The loss or its gradient was not finite for {count} steps in a row, up to step {step}. None of them changed the "
        f"parameters. The last batch is in {model_dir / 'bad_batches' / name}. Lower the learning rate or inspect the batch; "
        "TrainerConfig.max_skipped_in_a_row sets the limit."
    )
