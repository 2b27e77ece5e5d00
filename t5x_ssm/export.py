"""Takes a trained model out of its run folder, and back into one.

    python -m t5x_ssm.export --model_dir=RUN_FOLDER --output_dir=MODEL [--dtype=bfloat16]
    python -m t5x_ssm.export --input_dir=MODEL --output_dir=NEW_RUN_FOLDER
    python -m t5x_ssm.export --h3_state=model.pt --pattern="h3*6 attn h3*5" --output_dir=NEW_RUN_FOLDER

The first writes safetensors and a config.json (see `integrations.exported_model`), parameters alone. The second makes a run
folder of such a model: `--model_dir=NEW_RUN_FOLDER` evaluates, scores and generates with it, and
`--gin.checkpoints.RestoreCheckpointConfig.path=NEW_RUN_FOLDER` starts a training run from it. RUN_FOLDER may be one of its
checkpoints; it may be T5X's. The third does the same for a public H3 checkpoint, whose network is named by a gin file
(`networks/h3_125m.gin` with that PATTERN).
"""

import argparse
import os
import pathlib
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from t5x_ssm import config as config_lib
from t5x_ssm.errors import UserError
from t5x_ssm.integrations import exported_model, h3_checkpoints, stored_parameters
from t5x_ssm.training import run_folder
from t5x_ssm.training.parameter_groups import STATE_SPACE_PATTERN

DTYPES = ("float32", "bfloat16")


def export_model(checkpoint_path: str, output_dir: str, dtype: str | None = None) -> None:
    """Writes the parameters of a checkpoint as an exported model.

    Args:
      checkpoint_path: a checkpoint or a run folder.
      output_dir: a new folder.
      dtype: one of DTYPES, the type of floating-point parameters but those of state spaces, whose kernels a rounded pole or
        step would ruin; None as they are stored.
    """
    found = stored_parameters.read(checkpoint_path)
    arrays = found.arrays
    if dtype is not None:
        arrays = {
            name: array.astype(jnp.dtype(dtype)) if _may_be_cast(name, array) else array
            for name, array in arrays.items()
        }
    gin_text = stored_parameters.configuration_beside(found.path)
    description = {
        "step": found.step,
        "vocabulary": found.metadata.get("vocabulary"),
        "network": None if gin_text is None else _network_settings(os.fspath(found.path.parent / "config.gin")),
    }
    folder = run_folder.local("--output_dir", output_dir)
    exported_model.write(folder, arrays, description, gin_text)
    print(f"{sum(a.size for a in arrays.values()):,} parameters of step {found.step:,}: {folder}")


def import_model(input_dir: str, output_dir: str) -> None:
    """Makes a run folder, with a checkpoint of parameters alone, of an exported model."""
    arrays, description, gin_text = exported_model.read(pathlib.Path(input_dir))
    metadata = {} if description["vocabulary"] is None else {"vocabulary": description["vocabulary"]}
    # As training has them: projections are cast where they are used, and state spaces never are.
    arrays = {
        name: array.astype(np.float32) if array.dtype == jnp.bfloat16 else array for name, array in arrays.items()
    }
    path = stored_parameters.write(output_dir, arrays, description["step"], metadata, gin_text)
    print(f"{description['num_parameters']:,} parameters of step {description['step']:,}: {path}")


def import_h3(state_file: str, pattern: str, output_dir: str) -> None:
    """Makes a run folder, at step 0, of a public H3 checkpoint.

    Args:
      state_file: see `h3_checkpoints.read_file`.
      pattern: which layers are `h3` and which `attn`.
      output_dir: a new run folder.
    """
    arrays = h3_checkpoints.from_public(h3_checkpoints.read_file(pathlib.Path(state_file)), pattern)
    path = stored_parameters.write(output_dir, arrays, 0, {})
    print(f"{sum(a.size for a in arrays.values()):,} parameters: {path}")


def _may_be_cast(name: str, array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) and not re.search(STATE_SPACE_PATTERN, name)


def _network_settings(gin_file: str) -> dict[str, str]:
    """What a run's configuration says about its network: values as text by 'module.name.parameter'."""
    config_lib.load([gin_file])
    settings = config_lib.description()
    rooms = {path.stem for room in ("layers", "models") for path in (config_lib.PACKAGE / room).glob("*.py")}
    return {
        name: value
        for name, value in sorted(settings.items())
        if name.rpartition("/")[2].split(".")[0] in {*rooms, "initializers"} - {"objectives"}
    }


def main(argv: Sequence[str]) -> int:
    """Reads the command line; exports or imports."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.export", description=__doc__.split("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--model_dir", help="a run folder or a checkpoint, to export")
    given.add_argument("--input_dir", help="an exported model, to make a run folder of")
    given.add_argument("--h3_state", help="a public H3 checkpoint, to make a run folder of")
    parser.add_argument("--pattern", help="the layers of --h3_state, such as 'h3 attn h3*6 attn h3*3'")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES, help="type of exported parameters; as they are stored by default")
    options = parser.parse_args(argv)
    if bool(options.h3_state) != bool(options.pattern):
        raise UserError("--h3_state and --pattern go together: the file does not say which layers are attention.")
    if options.model_dir:
        export_model(options.model_dir, options.output_dir, options.dtype)
        return 0
    if options.dtype:
        raise UserError("--dtype goes with --model_dir: a run folder has float32 parameters.")
    if options.h3_state:
        import_h3(options.h3_state, options.pattern, options.output_dir)
        return 0
    import_model(options.input_dir, options.output_dir)
    return 0


if __name__ == "__main__":
    config_lib.run_main(main)
