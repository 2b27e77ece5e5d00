"""Parameter groups: which parameters learn at which rate and with which weight decay, and the recipes of the systems.

A group is a regular expression over parameter paths such as `decoder/segment_0/block_0/mixer/ssm/log_step`; the first group
that matches a parameter owns it. Whole paths, not leaf names, are matched: `scale` under `pre_norm` is a norm's, and a rule
that only sees `scale` cannot know.

What the recipes say of the leaves of a state space, beside a network that learns at the optimizer's schedule with its decay
(norms and biases are decayed in none):

| recipe                 | A, low rank        | B                  | Δ                  | C                | D                |
|------------------------|--------------------|--------------------|--------------------|------------------|------------------|
| default, `gss`, `h3`   | bounded, undecayed | bounded, undecayed | bounded, undecayed | network, decayed | network, decayed |
| `s4`                   | bounded, undecayed | bounded, undecayed | either, undecayed  | network, decayed | network, decayed |
| `dss`                  | bounded, undecayed | frozen at 1        | bounded, undecayed | bounded, undecayed | network, decayed |
| `s5`                   | a fraction of the network's rate, by one of four options                                     |

"Bounded" is min(schedule, 1e-3). The references bound the peak instead and scale the schedule with it; the two agree wherever
the peak is within the bound.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from t5x_ssm.errors import UserError

# A state space is a module called `ssm`, `shift_ssm`, …
STATE_SPACE_PATTERN = r"(^|/)(\w+_)?ssm/"
# Names of its leaves, as regular expressions. Complex ones end in _re and _im, the second direction's in _backward_re and …_im.
_POLES = (r"lambda_\w+", r"a_\w+")
_LOW_RANK = (r"p_\w+",)
_STEP = (r"log_step", r"log_dt\w*")
_INPUT = (r"b", r"b_\w+")
_OUTPUT = (r"c", r"c_\w+")
_SKIP = (r"d",)
# Everything in a module whose name contains `norm`, and every leaf that is a scale or a bias.
NO_DECAY_PATTERN = r"(^|/)\w*norm\w*/|(^|/)(scale|bias|\w+_bias)$"
# The options of S5's experiments: (leaves at the slow rate without decay, leaves at the slow rate with decay). Of the others
# all learn with the network.
_S5_OPTIONS = {
    "standard": ((*_POLES, *_STEP, *_INPUT), ()),
    "BandCdecay": ((*_POLES, *_STEP), _INPUT),
    "BfastandCdecay": ((*_POLES, *_STEP), ()),
    "noBCdecay": ((*_POLES, *_STEP, *_INPUT, *_OUTPUT, *_SKIP), ()),
}


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
      name: label of the group, in the start-up table and the optimizer state.
      pattern: regular expression, searched in the path 'a/b/c' of each parameter.
      learning_rate: a rate or schedule of its own, instead of the optimizer's.
      learning_rate_scale: factor on the optimizer's schedule.
      max_learning_rate: upper bound on the (scaled) schedule.
      weight_decay: decoupled decay, times the learning rate; None takes the optimizer's.
      frozen: the parameters never change, have no optimizer state, and stay out of gradient norms.
      factored: Adafactor may factor the second moment of these parameters. AdamW has nothing to factor.
      parameter_scaled: Adafactor multiplies their updates by the RMS of the parameter. AdamW never does.
      optional: the pattern may match nothing.
    """

    name: str
    pattern: str
    learning_rate: float | optax.Schedule | None = None
    learning_rate_scale: float = 1.0
    max_learning_rate: float | None = None
    weight_decay: float | None = None
    frozen: bool = False
    factored: bool = True
    parameter_scaled: bool = True
    optional: bool = False

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"Parameter group {self.name!r}: pattern {self.pattern!r} is no regex ({error}).") from None
        if self.learning_rate is not None and (self.learning_rate_scale != 1.0 or self.max_learning_rate is not None):
            raise UserError(
                f"Parameter group {self.name!r} sets learning_rate together with learning_rate_scale or "
                "max_learning_rate; the former replaces the optimizer's schedule, the latter adjust it. Choose one."
            )
        for field in ("learning_rate_scale", "max_learning_rate", "weight_decay"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"Parameter group {self.name!r}: {field} is {value!r}; it must be finite and >= 0.")


def default_groups(state_space_max_learning_rate: float = 1e-3) -> tuple[ParameterGroup, ...]:
    """The groups of any network whose state spaces are modules called `ssm`: A, Δ and B slow and undecayed.

    C, D and the rest are decayed, as in H3 and in S5's standard recipe. Adafactor neither factors nor rescales any
    parameter of a state space.
    """
    slow = (*_POLES, *_LOW_RANK, *_STEP, *_INPUT)
    return _recipe(_leaves("state_space", slow, max_learning_rate=state_space_max_learning_rate, weight_decay=0.0))


def gss_groups(state_space_max_learning_rate: float = 1e-3) -> tuple[ParameterGroup, ...]:
    """GSS: Λ slow and undecayed; B and Δ are no parameters. The paper gives no rates; DSS, which it simplifies, treats Λ so."""
    return default_groups(state_space_max_learning_rate)


def h3_groups(state_space_max_learning_rate: float = 1e-3) -> tuple[ParameterGroup, ...]:
    """H3 (2212.14052): A, B and Δ of the diagonal system and B of the shift slow and undecayed; every C and D decayed."""
    return default_groups(state_space_max_learning_rate)


def s4_groups(
    state_space_max_learning_rate: float = 1e-3, step_at_network_rate: bool = False
) -> tuple[ParameterGroup, ...]:
    """S4 (2111.00396) and S4D: A, its low-rank part, B and Δ slow and undecayed; C and D decayed.

    Args:
      state_space_max_learning_rate: bound of the slow rate.
      step_at_network_rate: Δ learns at the network's rate, still undecayed, as in SPADE's language model.
    """
    slow = _leaves(
        "state_space",
        (*_POLES, *_LOW_RANK, *_INPUT, *(() if step_at_network_rate else _STEP)),
        max_learning_rate=state_space_max_learning_rate,
        weight_decay=0.0,
    )
    if step_at_network_rate:
        return _recipe(slow, _leaves("state_space_step", _STEP, weight_decay=0.0))
    return _recipe(slow)


def dss_groups(state_space_max_learning_rate: float = 1e-3) -> tuple[ParameterGroup, ...]:
    """DSS (2203.14343): Δ, Λ and W, the output of each mode, slow and undecayed; D decayed."""
    slow = (*_POLES, *_STEP, *_OUTPUT)
    return _recipe(_leaves("state_space", slow, max_learning_rate=state_space_max_learning_rate, weight_decay=0.0))


def s5_groups(
    option: str = "standard", learning_rate_factor: float = 4.0, dt_global: bool = False
) -> tuple[ParameterGroup, ...]:
    """S5 (2208.04933), with the options and names of its experiments.

    Args:
      option: which leaves learn at the slow rate. 'standard': Λ, Δ and B, without decay. 'BandCdecay': these, but B with
        decay. 'BfastandCdecay': Λ and Δ without decay; B learns with the network. 'noBCdecay': all leaves, without decay.
        What is not slow learns with the network, with decay.
      learning_rate_factor: how many times the slow rate the network's is. The optimizer's schedule is the network's rate:
        an experiment with a state-space rate of 1e-3 and a factor of 4 has a peak of 4e-3.
      dt_global: Δ learns with the network, with decay.

    Raises:
      UserError: an unknown option, or a factor that is not positive.
    """
    if option not in _S5_OPTIONS:
        raise UserError(f"s5_groups.option = {option!r}; it is one of {', '.join(_S5_OPTIONS)}.")
    if not learning_rate_factor > 0:
        raise UserError(f"s5_groups.learning_rate_factor = {learning_rate_factor!r}; it must be positive.")
    slow, slow_decayed = _S5_OPTIONS[option]
    if dt_global:
        slow = tuple(leaf for leaf in slow if leaf not in _STEP)
    scale = 1.0 / learning_rate_factor
    groups = [_leaves("state_space", slow, learning_rate_scale=scale, weight_decay=0.0)]
    if slow_decayed:
        groups.append(_leaves("state_space_input", slow_decayed, learning_rate_scale=scale))
    return _recipe(*groups)


def frozen_state_space_groups(pattern: str = STATE_SPACE_PATTERN) -> tuple[ParameterGroup, ...]:
    """State spaces that keep their start, as SPADE's S4 may: nothing under `ssm/` is trained, the network is.

    Args:
      pattern: which parameters are frozen.
    """
    return _recipe(ParameterGroup("frozen", pattern, frozen=True))


def group_labels(params: Any, groups: Sequence[ParameterGroup]) -> Any:
    """The name of each parameter's group.

    Args:
      params: tree of parameters.
      groups: groups, first match wins.

    Returns:
      A tree like `params` of group names.

    Raises:
      UserError: a parameter belongs to no group, or a group that is not optional has no parameter.
    """

    def label(path, _):
        name = parameter_path(path)
        for group in groups:
            if re.search(group.pattern, name):
                return group.name
        raise UserError(f"Parameter {name} matches no parameter group; end `groups` with one whose pattern is ''.")

    labels = jax.tree_util.tree_map_with_path(label, params)
    used = set(jax.tree.leaves(labels))
    for group in groups:
        if group.name not in used and not group.optional:
            paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise UserError(
                f"Parameter group {group.name!r} has no parameter: nothing that an earlier group left matches "
                f"{group.pattern!r}. Correct the pattern or mark the group optional. Parameters: {', '.join(paths)}."
            )
    return labels


def parameter_path(path: Any) -> str:
    """'a/b/c' for a key path of a parameter tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(name: str, leaves: Sequence[str], **settings: Any) -> ParameterGroup:
    """The group of all state-space leaves of these names."""
    return _state_space_group(name, rf"{STATE_SPACE_PATTERN}(.*/)?({'|'.join(leaves)})$", **settings)


def _state_space_group(name: str, pattern: str, **settings: Any) -> ParameterGroup:
    """A group that Adafactor leaves whole: the two largest axes of a bank are no rows and columns of a matrix."""
    return ParameterGroup(name, pattern, factored=False, parameter_scaled=False, optional=True, **settings)


def _recipe(*state_space: ParameterGroup) -> tuple[ParameterGroup, ...]:
    """`state_space`, then norms and biases, then what is left of state spaces, then the network."""
    return (
        *state_space,
        # Before the rest of the state spaces: a norm inside one is a norm.
        ParameterGroup("no_decay", NO_DECAY_PATTERN, weight_decay=0.0, optional=True),
        _state_space_group("state_space_decayed", STATE_SPACE_PATTERN),
        ParameterGroup("decay", r""),
    )
