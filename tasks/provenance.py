"""What a token cache was made from, and whether that is still so."""

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
from collections.abc import Mapping

from tasks.corpora import settings

_SETTING = "setting "


def version(name: str) -> str | None:
    """The present version of something that a source depends on.

    Args:
      name: 'python', the name of an installed distribution, 'module NAME' for a digest of a module's source, 'variable NAME'
        for the value of an environment variable, or 'setting NAME' for one of `tasks.corpora.settings`.

    Returns:
      The version; None if it is not installed or not set.
    """
    kind, _, rest = name.partition(" ")
    if kind == "variable":
        return os.environ.get(rest) or None
    if name.startswith(_SETTING):
        return settings.value(rest)
    if name == "python":
        return platform.python_version()
    try:
        if kind == "module":
            spec = importlib.util.find_spec(rest)
            if not (spec and spec.origin):
                return None
            return hashlib.sha256(pathlib.Path(spec.origin).read_bytes()).hexdigest()[:16]
        return importlib.metadata.version(name)
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return None


def changes(made_from: Mapping[str, str | None]) -> list[str]:
    """What is not as it was when something was made, as text with both values; empty if all is.

    The place of a corpus counts only where it is set: whoever trains from a cache need not have the corpus.
    """
    now = {name: version(name) for name in made_from}
    return differences(made_from, {n: v for n, v in now.items() if v is not None or not settings.is_place(_bare(n))})


def differences(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """The names that both have with different values, as text: 'NAME was X and is Y'."""
    return [
        f"{_bare(name)} was {before[name]!r} and is {now[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def _bare(name: str) -> str:
    return name.removeprefix(_SETTING)
