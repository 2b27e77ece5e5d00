"""What a user has set: checks, with messages that name the setting, and settings that two modules have in common."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax import linen as nn

from t5x_ssm.errors import UserError


def require_positive(owner: str, **sizes: int) -> None:
    """Raises UserError for a size that is not at least 1.

    Args:
      owner: whose settings they are, such as 'GSS'.
      **sizes: values by the names of the settings.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{owner}.{name} = {size}; it must be at least 1.")


def require_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises UserError for a value that is not among the known ones; `name` is the setting's, with its owner's."""
    known = tuple(known)
    if value not in known:
        raise UserError(f"{name} = {value!r}; it is one of {', '.join(known)}.")


def require_steps(owner: str, step_min: float, step_max: float) -> None:
    """Raises UserError unless time steps can start log-uniformly between the two."""
    if not 0 < step_min <= step_max:
        raise UserError(
            f"{owner}.step_min = {step_min} and step_max = {step_max}: time steps need 0 < step_min <= step_max."
        )


def settings_of(module: nn.Module, owner: type[nn.Module]) -> dict[str, Any]:
    """The settings that `module` has from its base class `owner`, by name: what another subclass of it is built from."""
    names = (field.name for field in dataclasses.fields(owner) if field.name not in ("name", "parent"))
    return {name: getattr(module, name) for name in names}
