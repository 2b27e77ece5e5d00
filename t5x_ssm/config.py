"""Command lines and gin files, read strictly: a binding that would have no effect is an error.

Every entry point takes T5X's flags:

    --gin_file=FILE            repeatable; later files win. Looked up as given, then in --gin_search_paths, then among the
                               project's own files (`models/gss_192m.gin` is found from any folder)
    --gin.NAME=VALUE           a macro (--gin.BATCH_SIZE=64) or a parameter (--gin.decoder.Decoder.num_layers=8). A VALUE
                               that is not gin syntax is taken as a string, so quotes may be left out
    --gin_search_paths=A,B

gin itself ignores a misspelt macro and a parameter of something that the configuration never uses, and notices a missing
or mistyped value only where it is used. `check` finds all of these before anything runs.
"""

import argparse
import dataclasses
import difflib
import fnmatch
import inspect
import logging
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_config

from t5x_ssm.errors import UserError
from t5x_ssm.parallel import processes
from t5x_ssm.training import places
from tasks.corpora import settings as corpora

PACKAGE = pathlib.Path(__file__).resolve().parent
# gin also looks for a file as a resource of a package: `include 'runs/pretrain.gin'` would import any folder named `runs`
# that lies where the user stands, and fail on it.
gin_config._FILE_READERS[:] = [reader for reader in gin_config._FILE_READERS if reader[0] is open]
gin_config.register_file_reader(
    lambda path: places.place(path, "--gin_file").open(),
    lambda path: places.is_store(path) and places.place(path, "--gin_file").is_file(),
)


def gin_folder() -> pathlib.Path:
    """Where the project's gin files are: beside the package in a clone, inside it in an installed wheel."""
    inside = PACKAGE / "gin"
    return inside if inside.is_dir() else PACKAGE.parent / "gin"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command line says.

    Attributes:
      gin_files, bindings, search_paths: for `load`.
      options: the entry point's own options.
    """

    gin_files: tuple[str, ...]
    bindings: tuple[str, ...]
    search_paths: tuple[str, ...]
    options: argparse.Namespace


def parse_arguments(argv: Sequence[str], parser: argparse.ArgumentParser) -> Arguments:
    """Reads the flags above, and those that `parser` already has.

    Raises:
      UserError: a `--gin.` flag without a value.
    """
    parser.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="gin file; repeatable")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="NAME=VALUE", help="one gin binding")
    parser.add_argument("--gin_search_paths", default="", metavar="A,B", help="more folders to look for gin files in")
    rewritten = []
    for argument in argv:
        if argument.startswith("--gin."):
            if "=" not in argument:
                raise UserError(f"{argument}: a gin flag is written --gin.NAME=VALUE.")
            argument = "--gin_bindings=" + argument.removeprefix("--gin.")
        rewritten.append(argument)
    options = parser.parse_args(rewritten)
    paths = tuple(path for path in options.gin_search_paths.split(",") if path)
    return Arguments(tuple(options.gin_file), tuple(options.gin_bindings), paths, options)


def load(gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()) -> None:
    """Reads files, then bindings, into gin's configuration, replacing what it held.

    Raises:
      UserError: a file that is missing or cannot be read, an unknown name; the nearest names are suggested.
    """
    gin.clear_config()
    for folder in (*search_paths, str(gin_folder())):
        gin.add_config_file_search_path(folder)
    # gin logs an error for every folder of the search path that does not have a file.
    logging.disable(logging.ERROR)
    try:
        with _explained():
            gin.parse_config_files_and_bindings(list(gin_files), [], finalize_config=False)
    finally:
        logging.disable(logging.NOTSET)
    for binding in bindings:
        name, _, value = binding.partition("=")
        with _explained(f"--gin.{binding}"):
            gin.parse_config(f"{name.strip()} = {_as_gin_value(value.strip())}")


def load_run(arguments: Arguments, run_file: str) -> None:
    """Loads the configuration of a program that uses a trained model.

    With the option --model_dir that is the run folder's own `config.gin`, then `run_file`; otherwise the gin files of the
    command line, which name a model and `run_file` themselves. Bindings of the command line come last in both cases.

    Raises:
      UserError: there is no such run, or no configuration at all.
    """
    files = list(arguments.gin_files)
    model_dir = arguments.options.model_dir
    if model_dir:
        saved = places.place(model_dir, "--model_dir") / "config.gin"
        with places.reached(model_dir, "--model_dir"):
            is_there = saved.is_file()
        if not is_there:
            raise UserError(f"--model_dir={model_dir}: there is no config.gin, so this is no run folder.")
        files = [os.fspath(saved), run_file, *files]
    if not files:
        raise UserError("Nothing to run: give --model_dir=RUN_FOLDER, or --gin_file=… of a model and its run.")
    load(files, arguments.bindings, arguments.search_paths)
    if model_dir:
        _let_override(arguments.bindings)


def set_unless_given(**macros: str | None) -> None:
    """Gives macros that are still required a value; one that a file or a --gin. flag has set stays, as does a value of None."""
    for name, value in macros.items():
        key = (name, "gin.macro")
        if value is not None and _is_required(gin_config._CONFIG.get(key, {}).get("value", gin.REQUIRED)):
            gin.bind_parameter(f"{name}/gin.macro.value", value)


def training_root() -> tuple[Callable, ...]:
    """The training function, when the loaded configuration is that of a training run and its bindings therefore count."""
    from t5x_ssm.train import train

    return (train,) if train in gin_config._INVERSE_REGISTRY else ()


def check(root: Callable, *more_roots: Callable) -> None:
    """Checks that the configuration is complete for `root`, well typed, and used in all its parts.

    Args:
      root: the configured function that the program will call.
      more_roots: functions whose bindings may stand in the configuration, though the program does not call them.

    Raises:
      UserError: a value that still must be given, one of the wrong type, or bindings that have no effect.
    """
    configurable = gin_config._INVERSE_REGISTRY.get(root)
    if configurable is None:
        raise UserError(f"Nothing configures {_name(root)}: give a gin file, such as --gin_file=quickstart.gin.")
    reachable = _reachable(configurable.selector)
    undefined = sorted(
        scope
        for scope, selector in reachable
        if selector == "gin.macro"
        and scope
        and _is_required(gin_config._CONFIG.get((scope, selector), {}).get("value", gin.REQUIRED))
    )
    if undefined:
        flags = " ".join(f"--gin.{name}=…" for name in undefined)
        raise UserError(f"{', '.join(undefined)} must be set: {flags}")
    _check_required(configurable.selector)
    for other in more_roots:
        reachable |= _reachable(gin_config._INVERSE_REGISTRY[other].selector)
    _check_corpora()
    for scope, selector in corpora.set_in_gin():  # Read when data is, see `tasks.corpora.settings`.
        reachable |= _reachable(selector, scope)
    used = sorted(scope for scope, selector in reachable if selector == "gin.macro" and scope)
    for key, params in gin_config._CONFIG.items():
        if key in reachable or not params:
            continue
        scope, selector = key
        if selector == "gin.macro":
            raise UserError(f"Nothing uses {scope}.{_nearest(scope, used)}")
        name = _scoped(scope, gin_config._REGISTRY.minimal_selector(selector))
        raise UserError(f"{name}.{next(iter(params))} has no effect: nothing in the configuration refers to @{name}.")
    _check_types()


def description(without: Sequence[str] = ()) -> dict[str, str]:
    """The configuration as flat 'module.name.parameter: value' text, to tell one run from another.

    It does not depend on which macros and import names the gin files use.

    Args:
      without: patterns (`fnmatch`) of names to leave out: what may change between two starts of one run.
    """
    flat = {}
    for (scope, selector), params in gin_config._CONFIG.items():
        if selector == "gin.macro":
            continue
        for parameter, value in params.items():
            name = f"{_scoped(scope, _name(_function(selector)))}.{parameter}"
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in without):
                flat[name] = repr(_without_macros(value))
    return flat


def operative_text() -> str:
    """What a run used of the configuration, as a gin file.

    The corpora's settings are in it, which are looked up and not called; they stand before what turns dynamic registration on.
    """
    settings = "".join(f"{parameter} = {value!r}\n" for parameter, value in corpora.given().items())
    return settings + gin.operative_config_str()


def run_main(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs an entry point: mistakes of the user end with a message and status 2, everything else with a traceback and 1."""
    # Libraries have put a handler of their own on the root logger by now.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for library in ("absl", "jax", "orbax", "etils", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # It logs what it then raises, and every try before.
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {_own_message(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    processes.leave(status or 0)


def _as_gin_value(text: str) -> str:
    try:
        gin_config.parse_value(text)
    except (SyntaxError, ValueError):
        if text[:1] in "%@([{'\"":
            return text
        return repr(text)
    return text


def _own_message(error: Exception) -> str:
    """An error's message without the lines that gin adds about who called whom."""
    return re.split(r"\n  (?:In call to configurable|No values supplied by Gin)", str(error))[0]


def _let_override(bindings: Sequence[str]) -> None:
    """Removes what is more specific than a binding of the command line and would hide it.

    A run folder's configuration is gin's operative one, which writes each value with the scopes that it was used in
    (NETWORK/decoder.Decoder.embed_dim).
    """
    for binding in bindings:
        outer, _, target = binding.partition("=")[0].strip().rpartition("/")
        name, _, parameter = target.rpartition(".")
        selectors = gin_config._REGISTRY.matching_selectors(name) if name else []
        for (scope, selector), params in gin_config._CONFIG.items():
            if selector in selectors and scope != outer and f"/{outer}/".replace("//", "/") in f"/{scope}/":
                params.pop(parameter, None)


def _function(selector: str) -> Callable:
    return gin_config._REGISTRY.get_match(selector).wrapped


def _name(function: Callable) -> str:
    """'optimizers.adamw' for t5x_ssm.training.optimizers.adamw, and 'train' for t5x_ssm.train.train."""
    module = function.__module__.rpartition(".")[2]
    return function.__qualname__ if module == function.__qualname__ else f"{module}.{function.__qualname__}"


def _scoped(scope: str, name: str) -> str:
    return f"{scope}/{name}" if scope else name


def _is_required(value: Any) -> bool:
    """Whether a value is gin's mark for what the user must give, as such or as %gin.REQUIRED."""
    return value is gin.REQUIRED or repr(value) == "%gin.REQUIRED"


def _scopes(scope: str) -> list[str]:
    """The scopes whose bindings a call in scope a/b uses: '', a and a/b."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _calls(root: str, scope: str = "") -> dict[tuple[str, str], bool]:
    """(scope, selector) of all that a call of the selector `root` reaches, macros included; and whether it calls it."""
    found: dict[tuple[str, str], bool] = {}
    todo = [((scope, root), True)]
    while todo:
        call, called = todo.pop()
        if found.get(call, False) or (call in found and not called):
            continue
        found[call] = called
        scope, selector = call
        for outer in _scopes(scope):
            for value in gin_config._CONFIG.get((outer, selector), {}).values():
                for reference in _references(value):
                    own, selected = reference.config_key
                    # A scope of its own replaces the caller's, and a macro's name is a scope. What is only passed on
                    # (@name without parentheses) is called later, in no scope.
                    inherited = scope if reference.evaluate else ""
                    todo.append(((own or inherited, selected), reference.evaluate))
    return found


def _reachable(root: str, scope: str = "") -> set[tuple[str, str]]:
    """(scope, selector) of every binding that a call of the selector `root` would use."""
    return {(outer, selector) for scope, selector in _calls(root, scope) for outer in _scopes(scope)}


def _check_corpora() -> None:
    """Raises UserError for the place of a corpus that does not exist; a module of the user's may register others."""
    datasets = (
        params for (_, selector), params in gin_config._CONFIG.items() if selector.endswith("feed.DatasetConfig")
    )
    if not any(params.get("module") for params in datasets):
        try:
            corpora.check()
        except corpora.CorpusError as error:
            raise UserError(str(error)) from None


def _check_required(root: str) -> None:
    """Raises UserError where something that the configuration calls lacks a parameter without default."""
    called = [call for call, is_called in _calls(root).items() if is_called and call[1] != "gin.macro"]
    missing = []
    for scope, selector in sorted(called):
        bound = {name for outer in _scopes(scope) for name in gin_config._CONFIG.get((outer, selector), {})}
        for name, parameter in inspect.signature(_function(selector)).parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind in (
                parameter.KEYWORD_ONLY,
                parameter.POSITIONAL_OR_KEYWORD,
            )
            if needed and name not in bound:
                missing.append(f"{_scoped(scope, gin_config._REGISTRY.minimal_selector(selector))}.{name}")
    if missing:
        raise UserError(f"{', '.join(missing)} must be set, by a gin file or by --gin.NAME=VALUE.")


def _check_types() -> None:
    """Raises UserError for a number, string or truth value where the parameter's annotation asks for another."""
    for (scope, selector), params in gin_config._CONFIG.items():
        if selector == "gin.macro":
            continue
        try:
            hints = typing.get_type_hints(_function(selector))
        except (NameError, TypeError):  # Annotations that only a type checker can resolve.
            continue
        for parameter, value in params.items():
            hint = hints.get(parameter)
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            if not set(options) <= {int, float, str, bool, types.NoneType}:
                continue
            given = _without_macros(value)
            fits = type(given) in options or (type(given) is int and float in options)
            if not fits and not isinstance(given, gin_config.ConfigurableReference | _Reference):
                macro = value.scoped_selector.removesuffix("/gin.macro") if value is not given else ""
                name = _scoped(scope, gin_config._REGISTRY.minimal_selector(selector))
                wanted = " or ".join(_TYPES[option] for option in options)
                raise UserError(f"{macro or f'{name}.{parameter}'} = {given!r} is not {wanted}.")


_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "True or False", types.NoneType: "None"}


class _Reference(str):
    """How a reference is written in a description."""

    __repr__ = str.__str__


def _references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    for part in gin_config._iterate_flattened_values(value):
        if isinstance(part, gin_config.ConfigurableReference):
            yield part


def _without_macros(value: Any) -> Any:
    """`value` with the macros in it replaced by what they stand for, and other references by their names."""
    if isinstance(value, gin_config.ConfigurableReference):
        scope, selector = value.config_key
        if selector == "gin.macro":
            return _without_macros(gin_config._CONFIG[value.config_key]["value"])
        return _Reference(f"@{_scoped(scope, _name(_function(selector)))}{'()' if value.evaluate else ''}")
    if isinstance(value, dict):
        return {k: _without_macros(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_macros(v) for v in value)
    return value


class _explained:
    """Turns gin's errors into messages that name what is near."""

    def __init__(self, where: str = ""):
        self._where = where

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or not isinstance(error, Exception) or isinstance(error, UserError):
            return False
        text = str(error).strip()
        if isinstance(error, OSError) and "Unable to open file" in text:
            name = text.split(":")[-1].strip() if ":" in text else text
            files = [str(p.relative_to(gin_folder())) for p in sorted(gin_folder().rglob("*.gin"))]
            wanted = text.split("Unable to open file: ")[-1].split(".gin")[0] + ".gin"
            raise UserError(
                f"No gin file {wanted!r} here or among the project's own.{_nearest(wanted, files)}"
            ) from None
        first = " ".join(line.strip() for line in text.splitlines() if line.strip())
        hint = ""
        if "doesn't have a parameter named" in text:
            selector, parameter = text.split("'")[-4], text.split("doesn't have a parameter named '")[1].split("'")[0]
            selector = text.split("Configurable '")[1].split("'")[0] if "Configurable '" in text else selector
            match = gin_config._REGISTRY.get_match(selector)
            names = list(inspect.signature(match.wrapped).parameters) if match else []
            hint = _nearest(parameter, [n for n in names if n not in ("parent", "name")])
        elif "No configurable matching" in text:
            name = text.split("No configurable matching '")[1].split("'")[0]
            known = [_name(match.wrapped) for selector, match in gin_config._REGISTRY.items() if "gin." not in selector]
            hint = _nearest(name, known)
        prefix = f"{self._where}: " if self._where else ""
        raise UserError(f"{prefix}{first}{hint}") from None


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    return f" There are: {', '.join(sorted(names))}." if 0 < len(names) <= 40 else ""
