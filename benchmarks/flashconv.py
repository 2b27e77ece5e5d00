"""A Long Range Arena model with and without FlashConv: `python -m benchmarks.flashconv [--gin_file=models/s4d_listops.gin]`.

Whole train steps of a recipe (network, optimizer, length; a smaller batch), in turns: its state spaces convolve as the project
does, a chain of short transforms in which nothing is padded, or by the textbook, real transforms of twice the length. The H3 paper's
ratio on an A100 is 2.0 (5.8 over 2.9 times a Transformer's speed), where its convolution is a fused kernel. Content does not
matter to speed: the batch is random. Writes benchmarks/results/flashconv.json.
"""

import argparse
import functools
from typing import Any
from unittest import mock

import gin
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, timing
from t5x_ssm import config as config_lib
from t5x_ssm import train as train_lib
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.ssm import diagonal
from t5x_ssm.training.trainer import Trainer


def textbook(u_BLH, kernel_HL, *, anticausal_HL=None, resets=None):
    """`causal_convolution` by real transforms of twice the length, both directions in one kernel."""
    assert resets is None, "a classifier has no documents in a row"
    length = u_BLH.shape[1]
    kernel = kernel_HL[:, :length]
    if anticausal_HL is not None:
        # Lag -1-j of a cyclic convolution of 2 L is its lag 2 L - 1 - j.
        future = anticausal_HL[:, : length - 1][:, ::-1]
        kernel = jnp.pad(kernel, [(0, 0), (0, 2 * length - kernel.shape[1] - future.shape[1])])
        kernel = jnp.concatenate([kernel, future], axis=1)
    u = jnp.fft.rfft(jnp.swapaxes(u_BLH, 1, 2), n=2 * length)
    y = jnp.fft.irfft(u * jnp.fft.rfft(kernel, n=2 * length), n=2 * length)[..., :length]
    return jnp.swapaxes(y, 1, 2)


def compiled_step(training: Trainer, state: Any, batch: Any, convolution: Any) -> Any:
    """The train step whose diagonal state spaces convolve by `convolution`."""
    with mock.patch.object(diagonal, "causal_convolution", convolution), jax.set_mesh(training.mesh):
        return training.train_step.lower(state, batch).compile()


def measure(gin_file: str, batch_size: int, length: int | None, repeats: int) -> dict[str, Any]:
    """Seconds of both steps and their ratio."""
    bindings = ["MODEL_DIR=unused", f"BATCH_SIZE={batch_size}"]
    if length:
        bindings.append(f"TASK_FEATURE_LENGTHS={{'inputs': {length}, 'targets': 1}}")
    config_lib.load([gin_file], bindings)
    config_lib.check(train_lib.train)
    run = gin.get_bindings(train_lib.train)
    shapes = train_lib.batch_shapes(run["train_dataset_cfg"])
    random = np.random.default_rng(0)
    rows = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    rows["inputs"] = random.integers(1, 10, shapes["inputs"].shape).astype(np.int32)
    rows["input_lengths"][:] = shapes["inputs"].shape[1]
    steps, states, losses = {}, {}, {}
    for name, convolution in (("flashconv", diagonal.causal_convolution), ("textbook", textbook)):
        training = Trainer(run["model"], run["optimizer"], make_mesh(MeshConfig()), shapes)
        state, batch = training.initial_state(), training.to_device(rows)
        steps[name] = compiled_step(training, state, batch, convolution)
        states[name], metrics = jax.block_until_ready(steps[name](state, batch))
        losses[name] = float(metrics["loss"])

    def take(name):
        states[name], _ = steps[name](states[name], batch)
        return states[name]

    seconds = timing.in_turns({name: functools.partial(take, name) for name in steps}, repeats)
    return {
        "recipe": gin_file,
        "batch": batch_size,
        "length": shapes["inputs"].shape[1],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(states["textbook"].params)),
        "relative_difference_of_losses": abs(losses["flashconv"] / losses["textbook"] - 1),
        "seconds_a_step": {name: report.spread(values) for name, values in seconds.items()},
        "times_faster": timing.ratios(seconds["textbook"], seconds["flashconv"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", default="models/s4d_listops.gin", help="a recipe with diagonal state spaces")
    parser.add_argument("--batch", type=int, default=4, help="the recipes' own is 50 and more")
    parser.add_argument("--length", type=int, help="of the inputs; the recipe's own if not given")
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args()
    report.write("flashconv", measure(flags.gin_file, flags.batch, flags.length, flags.repeats))


if __name__ == "__main__":
    main()
