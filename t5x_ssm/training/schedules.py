"""Learning-rate schedules, as plain Optax schedules: functions of the number of updates already applied.

Every schedule speaks of the ordinal n = count + 1 of the update it is asked for. So the first update already moves the
parameters (a ramp over `count` would waste it on a rate of zero), update `warmup_steps` is the first at the peak, and
update `total_steps` is the one that reaches the final rate.
"""

import math

import jax
import jax.numpy as jnp
import optax

from t5x_ssm.errors import UserError

DECAY_SHAPES = ("linear", "sqrt", "cosine")


def constant(value: float, warmup_steps: int = 0) -> optax.Schedule:
    """`value` after a linear warm-up."""
    _check_rate("value", value)
    _check_steps("warmup_steps", warmup_steps, minimum=0)
    return lambda count: value * _ramp(_ordinal(count), warmup_steps)


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1) -> optax.Schedule:
    """Linear warm-up, then half a cosine from `peak` to `final_fraction * peak`, where it stays.

    Args:
      peak: the highest rate, reached by update `warmup_steps`.
      warmup_steps: updates of warm-up.
      total_steps: update that reaches the final rate, warm-up included.
      final_fraction: the final rate as a fraction of the peak, in [0, 1].

    Raises:
      UserError: a setting makes no sense, such as a warm-up longer than the whole.
    """
    _check_rate("peak", peak)
    _check_phases(total_steps, warmup_steps=warmup_steps)
    _check_fraction("final_fraction", final_fraction)

    def schedule(count):
        n = _ordinal(count)
        progress = _progress(n, warmup_steps, total_steps)
        return peak * _ramp(n, warmup_steps) * _decay("cosine", progress, final_fraction)

    return schedule


def rsqrt(peak: float, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then decay with the inverse square root of the update's ordinal.

    T5's pretraining schedule, 1/sqrt(max(n, k)) (Raffel et al. 2020, section 3.1.2), is `peak = k ** -0.5` but for the
    warm-up, which T5 replaces by a constant.
    """
    _check_rate("peak", peak)
    _check_steps("warmup_steps", warmup_steps, minimum=1)

    def schedule(count):
        n = _ordinal(count)
        return peak * _ramp(n, warmup_steps) * jnp.sqrt(warmup_steps / jnp.maximum(n, warmup_steps))

    return schedule


def wsd(
    peak: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int,
    final_fraction: float = 0.0,
    decay_shape: str = "linear",
) -> optax.Schedule:
    """Warm-up, stable, decay: the rate stays at `peak` until the last `decay_steps` updates (Hu et al. 2024, MiniCPM).

    Args:
      peak: the rate of the stable phase.
      warmup_steps: updates of linear warm-up.
      total_steps: update that reaches the final rate.
      decay_steps: updates of the decay, at the end of `total_steps`.
      final_fraction: the final rate as a fraction of the peak, in [0, 1].
      decay_shape: 'linear', 'sqrt' (1 - sqrt(progress), Hägele et al. 2024) or 'cosine'.

    Raises:
      UserError: a setting makes no sense, such as phases that do not fit into `total_steps`.
    """
    _check_rate("peak", peak)
    _check_phases(total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    _check_fraction("final_fraction", final_fraction)
    if decay_shape not in DECAY_SHAPES:
        raise UserError(f"decay_shape is {decay_shape!r}; it must be one of {', '.join(DECAY_SHAPES)}.")

    def schedule(count):
        n = _ordinal(count)
        progress = _progress(n, total_steps - decay_steps, total_steps)
        return peak * _ramp(n, warmup_steps) * _decay(decay_shape, progress, final_fraction)

    return schedule


def _ordinal(count) -> jax.Array:
    return jnp.asarray(count, jnp.float32) + 1.0


def _ramp(n: jax.Array, warmup_steps: int) -> jax.Array:
    return jnp.minimum(1.0, n / max(warmup_steps, 1))


def _progress(n: jax.Array, begin: int, end: int) -> jax.Array:
    """0 up to update `begin`, 1 from update `end` on."""
    return jnp.clip((n - begin) / max(end - begin, 1), 0.0, 1.0)


def _decay(shape: str, progress: jax.Array, final: float) -> jax.Array:
    """From 1 at progress 0 to `final` at progress 1."""
    if shape == "linear":
        fallen = progress
    elif shape == "sqrt":
        fallen = jnp.sqrt(progress)
    else:
        fallen = 0.5 * (1.0 - jnp.cos(jnp.pi * progress))
    return 1.0 - (1.0 - final) * fallen


def _check_rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value!r}; a learning rate must be finite and not negative.")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; it must lie between 0 and 1.")


def _check_steps(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or value != int(value) or value < minimum:
        raise UserError(f"{name} is {value!r}; it must be a whole number of steps, at least {minimum}.")


def _check_phases(total_steps: int, **phases: int) -> None:
    _check_steps("total_steps", total_steps, minimum=1)
    for name, steps in phases.items():
        _check_steps(name, steps, minimum=0)
    if sum(phases.values()) > total_steps:
        parts = " and ".join(f"{name}={steps}" for name, steps in phases.items())
        raise UserError(f"{parts} do not fit into total_steps={total_steps}; shorten them or train for longer.")
