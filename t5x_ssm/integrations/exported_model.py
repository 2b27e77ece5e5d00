"""An exported model: a folder that other libraries can read.

    model.safetensors   the parameters, by names such as `decoder/segment_0/block_0/mixer/ssm/d`
    config.json         format, step, num_parameters, vocabulary (name, size, special ids, hash), network (its settings)
    config.gin          the configuration of the run, where there is one

Needs the library safetensors (the extra `export`).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_ssm.errors import UserError

FORMAT = 1
PARAMETERS, CONFIG, GIN = "model.safetensors", "config.json", "config.gin"


def write(
    folder: pathlib.Path, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any], gin_text: str | None = None
) -> None:
    """Writes a model.

    Args:
      folder: made when it does not exist.
      arrays: the parameters by name.
      description: more entries of config.json.
      gin_text: contents of config.gin; None writes none.

    Raises:
      UserError: safetensors is missing, or the folder holds a model already.
    """
    library = _library()
    if (folder / CONFIG).exists():
        raise UserError(f"--output_dir={folder} holds an exported model already; give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    library.save_file(contiguous, str(folder / PARAMETERS), metadata={"format": "t5x_ssm"})
    if gin_text is not None:
        (folder / GIN).write_text(gin_text)
    count = sum(array.size for array in arrays.values())
    # Last, so that a folder with a config.json is whole.
    contents = {"format": f"t5x_ssm {FORMAT}", "num_parameters": count, **description}
    (folder / CONFIG).write_text(json.dumps(contents, indent=1) + "\n")


def read(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str | None]:
    """Reads (arrays by name, config.json, text of config.gin or None).

    Raises:
      UserError: safetensors is missing, or the folder holds no whole model.
    """
    library = _library()
    if not (folder / CONFIG).is_file():
        raise UserError(f"--input_dir={folder} is no exported model: it has no {CONFIG}.")
    description = json.loads((folder / CONFIG).read_text())
    if description.get("format") != f"t5x_ssm {FORMAT}":
        raise UserError(f"{folder / CONFIG} has format {description.get('format')!r}, and not 't5x_ssm {FORMAT}'.")
    try:
        arrays = library.load_file(str(folder / PARAMETERS))
    except Exception as error:  # The library raises its own kinds.
        raise UserError(f"{folder / PARAMETERS} cannot be read: {error}") from error
    count = sum(array.size for array in arrays.values())
    if count != description["num_parameters"]:
        raise UserError(
            f"{folder / PARAMETERS} holds {count:,} parameters, and {CONFIG} speaks of {description['num_parameters']:,}."
        )
    return arrays, description, (folder / GIN).read_text() if (folder / GIN).is_file() else None


def _library():
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("Exported models need the library safetensors; install t5x_ssm[export].") from None
    return safetensors.numpy
