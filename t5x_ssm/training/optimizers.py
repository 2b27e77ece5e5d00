"""AdamW and Adafactor over parameter groups, see `training.parameter_groups`.

Both optimizers are Optax gradient transformations with one fixed layout of state, whatever their settings: clipping and
weight decay can be switched between two runs of one checkpoint. The state is float32 even for parameters that are not.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_ssm.errors import UserError
from t5x_ssm.training import schedules
from t5x_ssm.training.parameter_groups import ParameterGroup, default_groups, group_labels, parameter_path

# Parameters with a leading axis over layers, as `models.stack` names them when it scans.
STACKED_PATTERN = r"(^|/)segment_\d+/"


class Optimizer(optax.GradientTransformationExtraArgs):
    """An Optax gradient transformation that can say what it does to which parameter.

    Attributes:
      name: 'adamw' or 'adafactor'.
      groups: the parameter groups, first match wins.
      schedules: group name to the schedule it applies, in the order of the groups; frozen groups have none.
      weight_decay: of groups that set none.
    """

    name: str
    groups: tuple[ParameterGroup, ...]
    schedules: Mapping[str, optax.Schedule]
    weight_decay: float

    def updates_applied(self, opt_state: Any) -> jax.Array:
        """The number of updates `opt_state` has seen; a skipped step is none. The schedules are functions of it."""
        return next(count for _, count in optax.tree.get_all_with_path(opt_state, "count"))

    def learning_rates(self, count: jax.Array | int) -> dict[str, jax.Array]:
        """The rates that the update after `count` others applies.

        Returns:
          'learning_rate', that of the last group (by default the decayed one, which is most of a network), and
          'learning_rate/<group>' of every group whose schedule is another.
        """
        main = list(self.schedules.values())[-1]
        rates = {"learning_rate": main(count)}
        rates |= {f"learning_rate/{name}": rate(count) for name, rate in self.schedules.items() if rate is not main}
        return {name: jnp.asarray(rate, jnp.float32) for name, rate in rates.items()}

    def gradient_norm(self, grads: Any) -> jax.Array:
        """The global norm that clipping sees: over every gradient but those of frozen groups."""
        return _trainable_norm(grads, self.groups)

    def group_rows(self, params: Any) -> list[dict[str, Any]]:
        """One row a group, for tables: name, pattern, leaves, parameters, weight_decay, frozen, first learning rate."""
        labels = jax.tree.leaves(group_labels(params, self.groups))
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        rows = []
        for group in self.groups:
            mine = [size for size, label in zip(sizes, labels, strict=True) if label == group.name]
            rows.append(
                {
                    "group": group.name,
                    "leaves": len(mine),
                    "parameters": sum(mine),
                    "learning_rate": _describe_rate(group),
                    "weight_decay": 0.0 if group.frozen else _weight_decay(group, self.weight_decay),
                    "pattern": group.pattern,
                }
            )
        return rows

    def group_table(self, params: Any) -> str:
        """The rows and their totals as aligned text."""
        rows = self.group_rows(params)
        total = {"group": "total"} | {k: sum(row[k] for row in rows) for k in ("leaves", "parameters")}
        header = ["group", "leaves", "parameters", "learning_rate", "weight_decay", "pattern"]
        cells = [header] + [[_cell(row.get(column, "")) for column in header] for row in [*rows, total]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        numeric = {"leaves", "parameters", "weight_decay"}
        lines = []
        for row in cells:
            aligned = [
                cell.rjust(width) if column in numeric else cell.ljust(width)
                for cell, width, column in zip(row, widths, header, strict=True)
            ]
            lines.append("  ".join(aligned).rstrip())
        return "\n".join([f"optimizer: {self.name}", *lines])


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    groups: Sequence[ParameterGroup] | None = None,
    clip_global_norm: float | None = 1.0,
    mu_dtype: Any = None,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019) by parameter groups.

    Args:
      learning_rate: a schedule of the number of applied updates, or a constant.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, times the learning rate, of groups that set none.
      groups: parameter groups, first match wins; `parameter_groups.default_groups()` if None.
      clip_global_norm: largest norm of all gradients together; None does not clip.
      mu_dtype: type of the first moment; float32 if None.
    """
    if mu_dtype not in (None, "float32", "bfloat16", jnp.float32, jnp.bfloat16):
        raise UserError(f"adamw.mu_dtype = {mu_dtype!r}; it must be 'float32', 'bfloat16' or None.")

    def scale(group: ParameterGroup) -> optax.GradientTransformation:
        del group
        return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)

    return _build("adamw", scale, learning_rate, weight_decay, groups, clip_global_norm)


def adafactor(
    learning_rate: float | optax.Schedule,
    *,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    min_dim_size_to_factor: int = 128,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    momentum_dtype: Any = jnp.float32,
    weight_decay: float = 0.0,
    groups: Sequence[ParameterGroup] | None = None,
    clip_global_norm: float | None = None,
    stacked_pattern: str | None = STACKED_PATTERN,
) -> Optimizer:
    """Adafactor (Shazeer & Stern 2018) by parameter groups.

    The learning rate is relative to the RMS of each parameter, except in groups with `parameter_scaled=False`, where it
    is absolute: by default the state-space group, whose rate has an absolute bound.

    Args:
      learning_rate: a schedule of the number of applied updates, or a constant.
      decay_rate: exponent of the second moment's decay, 1 - n^-decay_rate.
      eps: added to squared gradients.
      min_dim_size_to_factor: the two largest axes must both have this size for a second moment to be factored.
      clipping_threshold: largest RMS of a parameter's update before the learning rate; None does not clip.
      momentum: decay of a running mean of updates; None keeps none.
      momentum_dtype: its type.
      weight_decay: decoupled decay, times the learning rate, of groups that set none.
      groups: parameter groups, first match wins; `parameter_groups.default_groups()` if None.
      clip_global_norm: largest norm of all gradients together; None does not clip.
      stacked_pattern: paths of parameters whose first axis runs over layers. Each layer then has its own RMS, as if it
        were a parameter of its own; the axis is never factored unless it is one of the two largest.
    """

    def scale(group: ParameterGroup) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(
                factored=group.factored,
                decay_rate=decay_rate,
                epsilon=eps,
                min_dim_size_to_factor=min_dim_size_to_factor,
            ),
            optax.identity() if clipping_threshold is None else _clip_by_rms(clipping_threshold, stacked_pattern),
            _scale_by_parameter_rms(stacked_pattern) if group.parameter_scaled else optax.identity(),
            optax.identity()
            if momentum is None
            else optax.ema(momentum, debias=False, accumulator_dtype=momentum_dtype),
        )

    return _build("adafactor", scale, learning_rate, weight_decay, groups, clip_global_norm)


def _build(
    name: str,
    scale: Callable[[ParameterGroup], optax.GradientTransformation],
    learning_rate: float | optax.Schedule,
    weight_decay: float,
    groups: Sequence[ParameterGroup] | None,
    clip_global_norm: float | None,
) -> Optimizer:
    """Clipping over all gradients, then per group: `scale`, weight decay, learning rate."""
    groups = tuple(default_groups() if groups is None else groups)
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise UserError(f"Parameter groups must have different names, and are {', '.join(names)}.")
    if all(group.frozen for group in groups):
        raise UserError("Every parameter group is frozen: there is nothing to train.")
    if clip_global_norm is not None and not clip_global_norm > 0:
        raise UserError(f"clip_global_norm is {clip_global_norm!r}; it must be positive, or None for no clipping.")
    if not 0 <= weight_decay < float("inf"):
        raise UserError(f"weight_decay is {weight_decay!r}; it must be finite and >= 0.")
    base = _as_schedule(learning_rate)
    rates = {group.name: _group_schedule(group, base) for group in groups if not group.frozen}

    def transform(group: ParameterGroup) -> optax.GradientTransformation:
        if group.frozen:
            return optax.set_to_zero()
        decay = _weight_decay(group, weight_decay)
        return optax.chain(
            scale(group),
            optax.add_decayed_weights(decay) if decay else optax.identity(),
            optax.scale_by_learning_rate(rates[group.name]),
        )

    inner = optax.chain(
        optax.identity() if clip_global_norm is None else _clip(clip_global_norm, groups),
        optax.multi_transform({group.name: transform(group) for group in groups}, lambda p: group_labels(p, groups)),
    )

    def init(params):
        return inner.init(_at_least_float32(params))

    def update(grads, state, params=None, **extra_args):
        if params is None:
            raise ValueError("The optimizer needs the parameters: call update(grads, state, params).")
        return inner.update(_at_least_float32(grads), state, _at_least_float32(params), **extra_args)

    optimizer = Optimizer(init, update)
    optimizer.name = name
    optimizer.groups = groups
    optimizer.schedules = rates
    optimizer.weight_decay = weight_decay
    return optimizer


def _clip(max_norm: float, groups: Sequence[ParameterGroup]) -> optax.GradientTransformation:
    """Scales all gradients down so that their global norm is at most `max_norm`."""

    def update(grads, state, params=None):
        del params
        norm = _trainable_norm(grads, groups)
        # Exactly 1 below the bound, so that gradients which need no clipping keep their bits.
        factor = max_norm / jnp.maximum(norm, max_norm)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _clip_by_rms(threshold: float, stacked_pattern: str | None) -> optax.GradientTransformation:
    """Adafactor's update clipping: u / max(1, RMS(u) / threshold), per parameter and layer."""

    def clip(path, update):
        return update / jnp.maximum(1.0, _rms(path, update, stacked_pattern) / threshold)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def _scale_by_parameter_rms(stacked_pattern: str | None, minimum: float = 1e-3) -> optax.GradientTransformation:
    """Adafactor's relative step size: u * max(minimum, RMS(parameter)), per parameter and layer."""

    def scale(path, update, param):
        return update * jnp.maximum(minimum, _rms(path, param, stacked_pattern))

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))


def _rms(path: Any, x: jax.Array, stacked_pattern: str | None) -> jax.Array:
    """Root mean square of a parameter, or of each layer of a stacked one; broadcasts against it."""
    stacked = stacked_pattern is not None and re.search(stacked_pattern, parameter_path(path)) is not None
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(int(stacked), x.ndim)), keepdims=True))


def _trainable_norm(grads: Any, groups: Sequence[ParameterGroup]) -> jax.Array:
    frozen = {group.name for group in groups if group.frozen}
    labels = jax.tree.leaves(group_labels(grads, groups))
    return optax.global_norm([g for g, l in zip(jax.tree.leaves(grads), labels, strict=True) if l not in frozen])


def _as_schedule(learning_rate: float | optax.Schedule) -> optax.Schedule:
    return learning_rate if callable(learning_rate) else schedules.constant(learning_rate)


def _group_schedule(group: ParameterGroup, base: optax.Schedule) -> optax.Schedule:
    if group.learning_rate is not None:
        return _as_schedule(group.learning_rate)
    if group.learning_rate_scale == 1.0 and group.max_learning_rate is None:
        return base
    bound = float("inf") if group.max_learning_rate is None else group.max_learning_rate
    return lambda count: jnp.minimum(group.learning_rate_scale * base(count), bound)


def _weight_decay(group: ParameterGroup, default: float) -> float:
    return default if group.weight_decay is None else group.weight_decay


def _describe_rate(group: ParameterGroup) -> str:
    if group.frozen:
        return "frozen"
    if group.learning_rate is not None:
        return "its own schedule" if callable(group.learning_rate) else f"{group.learning_rate:g}"
    text = "schedule" if group.learning_rate_scale == 1.0 else f"{group.learning_rate_scale:g} x schedule"
    return text if group.max_learning_rate is None else f"min({text}, {group.max_learning_rate:g})"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _at_least_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
