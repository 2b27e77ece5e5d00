"""One training step and one evaluation step, as pure functions for `jax.jit`.

The gradient is that of the loss summed over the batch, divided by the whole batch's sum of loss weights. Nothing in it
depends on how many microbatches the batch is cut into, beyond float32 rounding (and dropout, whose masks are drawn per
microbatch; and batch norms, whose statistics are those of a microbatch).
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from t5x_ssm.errors import UserError
from t5x_ssm.training.optimizers import Optimizer
from t5x_ssm.training.train_state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# What the step itself reports; an objective may not use these names for its sums.
STEP_METRICS = ("grad_norm", "param_norm", "update_norm", "learning_rate", "skipped")


class Objective(Protocol):
    """What is trained: `loss_sum` is differentiated, `sums` are float32 scalars summed over tokens or examples.

    Attributes:
      loss_weights: the feature of a batch that holds the weights of its targets.
    """

    loss_weights: str

    def loss_sums(self, params: Any, batch: Batch, dropout_rng: jax.Array | None = None) -> tuple[jax.Array, Metrics]:
        """Returns (loss_sum, sums)."""


class MutableObjective(Objective, Protocol):
    """An objective whose network has state beside its parameters, `TrainState.flax_mutables`."""

    def mutable_loss_sums(
        self, params: Any, flax_mutables: Any, batch: Batch, dropout_rng: jax.Array | None = None
    ) -> tuple[jax.Array, Metrics, Any]:
        """Returns (loss_sum, sums, flax_mutables), the last as this batch leaves them: unchanged without a dropout rng."""


def make_train_step(
    objective: Objective | MutableObjective,
    optimizer: Optimizer,
    *,
    num_microbatches: int = 1,
    rng: jax.Array | None = None,
    param_shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the train step; jit it with the state donated.

    A step whose loss or gradient norm is not finite changes neither parameters, optimizer state nor mutables, not even by a
    bit: it only counts, with metric 'skipped' = 1.

    Args:
      objective: what to differentiate.
      optimizer: what to do with the gradient.
      num_microbatches: the batch is cut into this many parts, one in memory at a time.
      rng: key from which dropout keys are folded, by step and by microbatch; None trains without dropout, which networks
        with mutables cannot.
      param_shardings: tree of shardings like the parameters, which gradients and their accumulator then keep.

    Returns:
      A function (state, batch) -> (state, metrics). Metrics are float32 scalars: the objective's sums, 'grad_norm'
      (before clipping), 'param_norm' and 'update_norm', 'learning_rate' and 'learning_rate/<group>' as this update
      applies them, and 'skipped'.
    """
    _check_microbatches(num_microbatches)

    def keep_sharding(grads):
        return grads if param_shardings is None else jax.lax.with_sharding_constraint(grads, param_shardings)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if state.flax_mutables and rng is None:
            raise ValueError("A network with mutables updates them in training only, which needs an rng.")
        denominator = _normalizer(batch, objective.loss_weights)
        step_rng = None if rng is None else jax.random.fold_in(rng, state.step)

        def gradient(part: Batch, index: jax.Array | int, flax_mutables: Any):
            part_rng = None if step_rng is None else jax.random.fold_in(step_rng, index)

            def normalized_loss(params):
                loss_sum, sums, updated = _loss_sums(objective, params, flax_mutables, part, part_rng)
                return loss_sum / denominator, (sums, updated)

            (loss, (sums, updated)), grads = jax.value_and_grad(normalized_loss, has_aux=True)(state.params)
            return _float32((keep_sharding(grads), loss, sums)), updated

        (grads, loss, sums), flax_mutables = _over_microbatches(gradient, batch, num_microbatches, state.flax_mutables)
        grads = keep_sharding(grads)
        _check_names(sums)

        grad_norm = optimizer.gradient_norm(grads)
        healthy = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=_where(healthy, params, state.params),
            opt_state=_where(healthy, opt_state, state.opt_state),
            flax_mutables=_where(healthy, flax_mutables, state.flax_mutables),
        )
        metrics = {
            **sums,
            "grad_norm": grad_norm,
            "param_norm": optax.global_norm(new_state.params),
            "update_norm": jnp.where(healthy, optax.global_norm(updates), 0.0),
            **optimizer.learning_rates(optimizer.updates_applied(state.opt_state)),
            "skipped": 1.0 - healthy.astype(jnp.float32),
        }
        return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}

    return train_step


def make_eval_step(
    objective: Objective | MutableObjective, *, num_microbatches: int = 1
) -> Callable[[Any, Batch, Any], Metrics]:
    """Builds the evaluation step, a function (params, batch, flax_mutables) -> the objective's sums.

    It has no dropout, and batch norms use their running averages. `flax_mutables` may be left out where there are none.

    Args:
      objective: what to evaluate.
      num_microbatches: the batch is cut into this many parts, one in memory at a time.
    """
    _check_microbatches(num_microbatches)

    def eval_step(params: Any, batch: Batch, flax_mutables: Any = None) -> Metrics:
        def sums(part: Batch, index: jax.Array | int, carried: tuple[()]):
            del index
            return _float32(_loss_sums(objective, params, flax_mutables, part, None)[1]), carried

        return _over_microbatches(sums, batch, num_microbatches, ())[0]

    return eval_step


def split_microbatches(batch: Batch, num_microbatches: int) -> Batch:
    """Cuts arrays [B, …] into [M, B/M, …], row b going to microbatch b mod M.

    Taking every M-th row, rather than runs of rows, leaves each device with its own rows when the batch axis is sharded
    (and M divides the rows of a device), so that cutting communicates nothing.

    Raises:
      UserError: the batch size is no multiple of `num_microbatches`.
    """
    for name, array in batch.items():
        if array.shape[0] % num_microbatches:
            raise UserError(
                f"A batch of {array.shape[0]} rows ({name}) cannot be cut into num_microbatches={num_microbatches} "
                "equal parts; change BATCH_SIZE or num_microbatches so that one divides the other."
            )

    def split(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]), 0, 1)

    return {name: split(array) for name, array in batch.items()}


def _loss_sums(objective: Objective | MutableObjective, params: Any, flax_mutables: Any, batch: Batch, rng) -> tuple:
    """(loss_sum, sums, flax_mutables) of an objective with mutables or without."""
    if flax_mutables:
        return objective.mutable_loss_sums(params, flax_mutables, batch, rng)
    return *objective.loss_sums(params, batch, rng), flax_mutables


def _over_microbatches(
    function: Callable[[Batch, Any, Any], tuple[Any, Any]], batch: Batch, num_microbatches: int, carried: Any
) -> tuple[Any, Any]:
    """Runs `function(microbatch, index, carried) -> (summand, carried)` over microbatches, one after the other.

    Returns:
      The sum of the summands, and what the last microbatch carried on.
    """
    if num_microbatches == 1:
        return function(dict(batch), 0, carried)
    parts = split_microbatches(batch, num_microbatches)
    first, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), 0, carried)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def body(totals, indexed_part):
        total, carried = totals
        index, part = indexed_part
        summand, carried = function(part, index, carried)
        return (jax.tree.map(jnp.add, total, summand), carried), None

    return jax.lax.scan(body, (zeros, carried), (jnp.arange(num_microbatches), parts))[0]


def _normalizer(batch: Batch, name: str) -> jax.Array:
    """The sum of the loss weights of the whole batch; 1 if there are none, so that the gradient is 0 and not NaN."""
    if name not in batch:
        raise UserError(f"The batch has no {name}; it has {', '.join(sorted(batch))}.")
    total = jnp.sum(batch[name].astype(jnp.float32))
    return jnp.where(total > 0, total, 1.0)


def _check_microbatches(num_microbatches: int) -> None:
    if num_microbatches < 1:
        raise UserError(f"num_microbatches is {num_microbatches}; it must be at least 1.")


def _check_names(sums: Metrics) -> None:
    clash = sorted(set(sums) & set(STEP_METRICS))
    if clash:
        raise ValueError(f"The objective's sums use names that the train step reports itself: {', '.join(clash)}.")


def _float32(tree: Any) -> Any:
    """Casts up to float32 what is narrower; leaves float64 alone."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
