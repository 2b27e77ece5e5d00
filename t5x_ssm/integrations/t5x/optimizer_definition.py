"""The project's optimizers as T5X's optimizer definitions, and T5X's Adafactor told about state spaces."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from t5x import adafactor, optimizers

from t5x_ssm.errors import UserError
from t5x_ssm.training.optimizers import Optimizer
from t5x_ssm.training.parameter_groups import STATE_SPACE_PATTERN


class OptimizerDefinition(optimizers.OptaxWrapper):
    """An optimizer of `training.optimizers` under T5X, parameter groups included.

    T5X hands every optimizer the rate of `Trainer.learning_rate_fn`, and its Optax wrapper ignores it: what is applied
    is the optimizer's own schedule. `learning_rate_fn` makes T5X log that one.
    """

    def __init__(self, optimizer: Optimizer):
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"OPTIMIZER is {optimizer!r}; it must be one of t5x_ssm.training.optimizers.")
        super().__init__(optimizer)


def learning_rate_fn(optimizer: Optimizer) -> Callable[[jax.Array | int], jax.Array]:
    """The rate that `optimizer` applies in T5X's step number `step`, for `trainer.Trainer.learning_rate_fn`.

    It is that of the group 'decay', or the last group; other groups may be slower. T5X applies every step, so steps and
    updates are the same count.
    """
    return lambda step: optimizer.learning_rates(step)["learning_rate"]


def _factored_axes(state: optax.FactoredState, params_axes: Any) -> optax.FactoredState:
    """Whole second moments lie as their parameters; rows and columns are small and lie everywhere."""

    def whole(axes, moment):
        if isinstance(moment, optax.MaskedNode):
            return moment
        return axes if len(moment.shape) == len(axes) and moment.shape != (1,) else None

    def small(axes, moment):
        return moment if isinstance(moment, optax.MaskedNode) else None

    return optax.FactoredState(
        count=None,
        v_row=jax.tree.map(small, params_axes, state.v_row),
        v_col=jax.tree.map(small, params_axes, state.v_col),
        v=jax.tree.map(whole, params_axes, state.v),
    )


# The one state of `training.optimizers` that T5X has no rule for.
optimizers.OptaxStatePartitionRules._RULES.setdefault(optax.FactoredState, _factored_axes)


def factor_rules() -> dict[str, adafactor.FactorDim]:
    """T5X's factor rules with the axes that these networks add, for `adafactor.Adafactor.logical_factor_rules`.

    A bank of state spaces, [channels, modes], is no matrix whose rows and columns mean something, so its second moment
    stays whole; a projection, [embed, channels], is one.
    """
    return {
        **adafactor.standard_logical_factor_rules(),
        "channels": adafactor.FactorDim.COLUMN,
        "modes": adafactor.FactorDim.NONE,
        "abspos_buckets": adafactor.FactorDim.NONE,
    }


class Adafactor(adafactor.Adafactor):
    """T5X's Adafactor, which leaves state spaces unfactored and their rates absolute.

    T5X sets aside the factor rules of an array of at most two dimensions and factors it by its sizes; that would reach
    the state spaces of layers that are not scanned. Its other defaults hold, and it does use `Trainer.learning_rate_fn`.
    """

    def __init__(self, **settings: Any):
        """Takes T5X's settings but `multiply_by_parameter_scale` and `factor_map`."""
        for name in ("multiply_by_parameter_scale", "factor_map"):
            if name in settings:
                raise UserError(f"Adafactor.{name} is set by the paths of the state spaces and cannot be given.")
        scaled = adafactor.HParamMap(((STATE_SPACE_PATTERN, False), (r"", True)))
        super().__init__(multiply_by_parameter_scale=scaled, **{"logical_factor_rules": factor_rules(), **settings})

    def set_param_axes(self, param_logical_axes: Any) -> None:
        super().set_param_axes(param_logical_axes)
        unscanned = {
            path: None
            for path, rule in self.hyper_params.factor_map.items()
            if re.search(STATE_SPACE_PATTERN, path) and adafactor.FactorDim.BATCH not in rule
        }
        self.hyper_params = self.hyper_params.replace(factor_map=self.hyper_params.factor_map | unscanned)
