"""What the training loop costs beside the step: `python -m benchmarks.loop [--steps=20] [--repeats=5]`.

Two ways to make the same steps take turns in one process, set up as training sets up its own: the bare jitted step on one
resident batch, and the engine's whole loop (feed, transfer to the device, metrics, history, checkpoint hand-off). Inside the
loop the host's own work is clocked apart: the time it spends, while it could have been waiting for the device, on data, history
and checkpoints.
Writes benchmarks/results/loop.json.
"""

import argparse
import functools
import pathlib
import tempfile
import time

import jax

from benchmarks import report
from t5x_ssm.data import feed as feed_lib
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.models.objectives import LanguageModel
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.train import batch_shapes
from t5x_ssm.training import checkpoints, optimizers, trainer
from t5x_ssm.training.host_memory import keep_freed_memory
from t5x_ssm.training.metrics import MetricsLog

# The quickstart's period; a hand-off is paid once in so many steps.
CHECKPOINT_PERIOD = 100
SIZES = {
    "quickstart": {"embed_dim": 128, "num_layers": 4, "state_size": 64, "length": 512, "batch": 8},
    "20M": {"embed_dim": 512, "num_layers": 8, "state_size": 64, "length": 512, "batch": 4},
}


class Clocked:
    """Passes calls on, and adds up the time of those named."""

    def __init__(self, target, *names: str):
        self._target, self._names, self.seconds = target, names, 0.0

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if name not in self._names:
            return value

        @functools.wraps(value)
        def clocked(*args, **kwargs):
            began = time.perf_counter()
            try:
                return value(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return clocked


def measure(size: dict[str, int], steps: int, repeats: int, folder: pathlib.Path) -> dict:
    """Figures of one size of network."""
    network = Decoder(
        vocab_size=259,
        embed_dim=size["embed_dim"],
        num_layers=size["num_layers"],
        mixers={"gss": functools.partial(GSS, state_size=size["state_size"])},
    )
    config = feed_lib.DatasetConfig(
        "embedded_books_code_math", {"targets": size["length"]}, split="train", batch_size=size["batch"]
    )
    feed = feed_lib.open_feed(config)
    run = trainer.Trainer(LanguageModel(network), optimizers.adamw(1e-4), make_mesh(MeshConfig()), batch_shapes(config))
    state = run.initial_state()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    loop = trainer.LoopState()
    checkpointer = checkpoints.Checkpointer(folder / "run")
    log = MetricsLog(folder / "metrics.jsonl", tensorboard_dir=folder)

    with jax.set_mesh(run.mesh):
        resident = run.to_device(feed.next())
        state, metrics = run.train_step(state, resident)
        jax.block_until_ready(metrics)

    bare, whole, host, hand_off = [], [], [], []
    step = 0
    for _ in range(repeats):
        with jax.set_mesh(run.mesh):
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = run.train_step(state, resident)
            jax.block_until_ready(state)
            bare.append((time.perf_counter() - began) / steps)

        clocked_feed, clocked_log, clocked_run = Clocked(feed, "next"), Clocked(log, "write"), Clocked(run, "to_device")
        saved = []

        def save(at, state, dataset_state, loop_state, saved=saved):
            jax.block_until_ready(state)
            began = time.perf_counter()
            checkpointer.save(at, state.to_tree(), dataset_state, {"loop": loop_state})
            saved.append(time.perf_counter() - began)

        began = time.perf_counter()
        state, step, _ = trainer.fit(
            clocked_run,
            state,
            clocked_feed,
            loop,
            first_step=step,
            total_steps=step + steps,
            model_dir=folder,
            log=clocked_log,
            save=save,
            save_due=lambda at: False,
        )
        total = time.perf_counter() - began - sum(saved)
        checkpointer.wait()
        whole.append(total / steps)
        host.append((clocked_feed.seconds + clocked_log.seconds + clocked_run.seconds) / steps)
        hand_off.append(saved[0] / CHECKPOINT_PERIOD)
    feed.close()
    checkpointer.close()
    log.close()
    pairs = list(zip(bare, whole, host, hand_off, strict=True))
    return {
        "parameters": parameters,
        "steps": steps,
        "bare_step_seconds": report.spread(bare),
        "loop_step_seconds": report.spread(whole),
        "host_share_of_step": report.spread([(h + c) / b for b, _, h, c in pairs]),
        "of_which_checkpoint_hand_off": report.spread([c / b for b, _, _, c in pairs]),
        "loop_over_bare": report.spread([w / b for b, w, _, _ in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", default=",".join(SIZES))
    options = parser.parse_args()
    keep_freed_memory()
    figures = {}
    for name in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(SIZES[name], options.steps, options.repeats, pathlib.Path(folder))
    report.write("loop", figures)


if __name__ == "__main__":
    main()
