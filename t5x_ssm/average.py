"""The mean of the parameters of several checkpoints, which often scores better than each of them.

    python -m t5x_ssm.average --model_dir=RUN_FOLDER --last=5 --output_dir=AVERAGE
    python -m t5x_ssm.average --checkpoints=RUN/checkpoint_900,OTHER/checkpoint_1000 --output_dir=AVERAGE

Writes `AVERAGE/checkpoint_<the largest step>`, with parameters alone, and the run's `config.gin`: `--model_dir=AVERAGE`
evaluates it, and `--gin.checkpoints.RestoreCheckpointConfig.path=AVERAGE` starts a run from it.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from t5x_ssm import config as config_lib
from t5x_ssm.errors import UserError
from t5x_ssm.integrations import stored_parameters
from t5x_ssm.training import run_folder


def average(paths: Sequence[str], output_dir: str) -> str:
    """Writes the mean of some checkpoints' parameters.

    Args:
      paths: checkpoints of one network; they are read one after the other.
      output_dir: run folder of the mean.

    Returns:
      The path of the checkpoint.

    Raises:
      UserError: fewer than two checkpoints, or checkpoints of different networks or vocabularies.
    """
    if len(paths) < 2:
        raise UserError(f"A mean needs at least two checkpoints, and there are {len(paths)}: {', '.join(paths)}.")
    first = stored_parameters.read(paths[0])
    # Sums are float64, so that the order of the checkpoints changes nothing but the last bit.
    sums = {name: array.astype(np.float64) for name, array in first.arrays.items()}
    step = first.step
    for path in paths[1:]:
        other = stored_parameters.read(path)
        _check_same(first, other)
        step = max(step, other.step)
        for name, array in other.arrays.items():
            sums[name] += array
    arrays = {name: (total / len(paths)).astype(first.arrays[name].dtype) for name, total in sums.items()}
    metadata = {name: first.metadata[name] for name in ("vocabulary",) if name in first.metadata}
    metadata["average_of"] = [str(path) for path in paths]
    config = stored_parameters.configuration_beside(first.path)
    return str(stored_parameters.write(output_dir, arrays, step, metadata, config))


def _check_same(first: stored_parameters.StoredParameters, other: stored_parameters.StoredParameters) -> None:
    shapes = [{name: array.shape for name, array in of.arrays.items()} for of in (first, other)]
    differing = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        raise UserError(
            f"{first.path} and {other.path} are of different networks: {len(differing)} parameters differ in name or "
            f"shape, among them {differing[0]}."
        )
    hashes = [of.metadata.get("vocabulary", {}).get("hash") for of in (first, other)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise UserError(f"{first.path} and {other.path} were trained with different vocabularies.")


def main(argv: Sequence[str]) -> int:
    """Reads the command line and averages."""
    parser = argparse.ArgumentParser(prog="python -m t5x_ssm.average", description=__doc__.split("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--model_dir", help="a run folder, of whose newest checkpoints --last are taken")
    given.add_argument("--checkpoints", help="paths, separated by commas")
    parser.add_argument("--last", type=int, default=5, help="how many of --model_dir")
    parser.add_argument("--output_dir", required=True, help="a new run folder")
    options = parser.parse_args(argv)
    if options.checkpoints:
        paths = options.checkpoints.split(",")
    else:
        steps = run_folder.checkpoint_steps(options.model_dir)
        if options.last < 2 or len(steps) < options.last:
            raise UserError(f"--last={options.last}, but {options.model_dir} has {len(steps)} checkpoints: {steps}.")
        paths = [str(run_folder.checkpoint_path(options.model_dir, step)) for step in steps[-options.last :]]
    path = average(paths, options.output_dir)
    print(f"the mean of {len(paths)} checkpoints: {path}")
    return 0


if __name__ == "__main__":
    config_lib.run_main(main)
