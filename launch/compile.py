"""What a training run would need and do on a TPU slice, from the TPU's own compiler, without a TPU.

    python -m launch.compile --gin_file=models/gss_7b.gin --topology=v5p:4x4x8 [--slices=2] [--search] [--gin.NAME=VALUE]

Compiles the train step of the configuration as it is, for all devices of the topology, and reads memory, FLOPs and collectives
from the compiled program. Prints the plan and keeps it as JSON under --output_dir, by a hash of the configuration; the same
question is answered from there, as long as the code makes the same program of it. Exits with status 2 when the program does
not fit. Times are predictions, see `launch.roofline`. Needs libtpu: `pip install 't5x_ssm[aot]'`.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax

from launch import chips, costs, roofline
from t5x_ssm import config as config_lib
from t5x_ssm.errors import UserError
from t5x_ssm.parallel import mesh as mesh_lib
from t5x_ssm.parallel import rules
from t5x_ssm.training import trainer as trainer_lib

# What --search tries.
ROWS_PER_SHARD = (1, 2, 4, 8, 16)
POLICIES = ("projections", "full")


class DoesNotFit(UserError):
    """The compiler refuses the program for want of memory."""


def load(arguments: config_lib.Arguments, *more_bindings: str) -> dict[str, Any]:
    """The arguments that the configuration gives `t5x_ssm.train.train`. What only a real run needs may be missing."""
    config_lib.load(arguments.gin_files, (*arguments.bindings, *more_bindings), arguments.search_paths)
    config_lib.set_unless_given(MODEL_DIR="planned", MIXTURE_OR_TASK_NAME="planned")
    from t5x_ssm.train import train

    config_lib.check(train)
    return gin.get_bindings(train)


def question(topology: str, slices: int) -> dict[str, Any]:
    """All that the answer depends on besides the code: the loaded configuration, the devices, the compiler."""
    return {
        "configuration": config_lib.description(("train.model_dir", "train.*eval*", "checkpoints.*")),
        "topology": topology,
        "slices": slices,
        "compiler": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step that is lowered and not yet compiled.

    Attributes:
      run: of `load`.
      chip: what it is for.
      mesh: its devices.
      trainer: whose step it is.
      batch: shapes of the global batch.
      traced: the step with its jaxpr.
      lowered: the same as StableHLO.
      seconds, cpu_seconds: what tracing and lowering took.
    """

    run: dict[str, Any]
    chip: chips.Chip
    mesh: jax.sharding.Mesh
    trainer: trainer_lib.Trainer
    batch: dict[str, jax.ShapeDtypeStruct]
    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    seconds: float
    cpu_seconds: float

    @property
    def digest(self) -> str:
        """Stands for the program as the code of today writes it: no names of files or lines are in it."""
        return hashlib.sha256(self.lowered.as_text().encode()).hexdigest()[:16]


def lower(run: dict[str, Any], topology: str, slices: int) -> Program:
    """Traces and lowers the train step, which takes seconds where compiling takes minutes.

    Args:
      run: of `load`.
      topology: such as 'v5p:4x4x8'.
      slices: how many such slices, joined over the data-centre network.
    """
    from t5x_ssm.train import batch_shapes

    chip = chips.parse_topology(topology)
    mesh = mesh_lib.make_mesh(run.get("mesh", mesh_lib.MeshConfig()), chips.topology_devices(topology, slices))
    settings = run.get("trainer", trainer_lib.TrainerConfig())
    shapes = batch_shapes(run["train_dataset_cfg"])
    trainer = trainer_lib.Trainer(run["model"], run["optimizer"], mesh, shapes, config=settings)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rules.batch_sharding(mesh, len(leaf.shape)))
        for name, leaf in shapes.items()
    }
    start, cpu_start = time.monotonic(), time.process_time()
    with jax.set_mesh(mesh):
        traced = trainer.train_step.trace(trainer.abstract_state, batch)
        lowered = traced.lower()
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    return Program(run, chip, mesh, trainer, batch, traced, lowered, seconds, cpu_seconds)


def make_plan(program: Program) -> dict[str, Any]:
    """Compiles the train step and reads the result.

    Returns:
      The plan, JSON-able; bytes, FLOPs and seconds are those of one device and one step.

    Raises:
      DoesNotFit: names the largest arrays and what to change.
    """
    run, chip, mesh, batch = program.run, program.chip, program.mesh, program.batch
    start, cpu_start = time.monotonic(), time.process_time()
    with jax.set_mesh(mesh):
        try:
            compiled = program.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(_refusal(str(error), program.traced.jaxpr.jaxpr)) from error
    seconds = program.seconds + time.monotonic() - start
    cpu_seconds = program.cpu_seconds + time.process_time() - cpu_start

    work = costs.of_program(compiled.as_text(), mesh.shape)
    memory = compiled.memory_analysis()
    state = program.trainer.abstract_state
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    used = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    # Of an encoder-decoder the input text's, which is the long one.
    shape = batch.get("encoder_input_tokens", batch["decoder_input_tokens"]).shape
    tokens = shape[0] * shape[1]
    needed = roofline.model_flops(run["model"].network, state.params, batch) / mesh.size
    times = roofline.step_seconds(work, chip)
    return {
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "batch": shape[0],
        "length": shape[1],
        "parameters": parameters,
        "bytes": {
            "parameters": _local_bytes(state.params),
            "optimizer": _local_bytes(state.opt_state),
            "temporaries": memory.temp_size_in_bytes,
            "used": used,
            "hbm": chip.hbm_bytes,
        },
        "hbm_free": 1 - used / chip.hbm_bytes,
        "flops": {"model": needed, "program": work.flops, "program_times_passes": work.passes_flops},
        "hbm_traffic_bytes": work.hbm_bytes,
        "collectives": [dataclasses.asdict(collective) for collective in work.collectives],
        "unknown_loops": list(work.unknown_loops),
        "predicted": {
            "seconds": times,
            "bound_by": max(("compute", "hbm", "interconnect", "network"), key=times.get),
            "utilisation": {way: needed / chip.flops / times[way] for way in ("overlapped", "in_turn")},
            "tokens_per_second": {way: tokens / times[way] for way in ("overlapped", "in_turn")},
        },
        "compile_seconds": seconds,
        "compile_cpu_seconds": cpu_seconds,
    }


def cached_plan(run: dict[str, Any], name: str, topology: str, slices: int, folder: pathlib.Path) -> dict[str, Any]:
    """`make_plan`, or what it answered before to the same question about the same program.

    The file's name stands for the question and its `program` for the lowered train step, so that an edit of the code makes
    those plans anew whose program it changes, in their old places, and no others.
    """
    asked = question(topology, slices)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{name}_{topology.replace(':', '_')}{f'_x{slices}' if slices > 1 else ''}_{digest}.json"
    program = lower(run, topology, slices)
    if path.is_file():
        plan = json.loads(path.read_text())
        if plan.get("program") == program.digest:
            return plan
        print(f"{path.name} is of another program than the code makes now; compiling this one", flush=True)
    plan = {"name": name, **asked, "program": program.digest, **make_plan(program)}
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plan, indent=1) + "\n")
    partial.rename(path)  # An interrupted run leaves whole plans only.
    return plan


def describe(plan: dict[str, Any]) -> str:
    """A plan as text for people."""
    gib = lambda size: f"{size / chips.GIB:.2f} GiB"
    size, predicted = plan["bytes"], plan["predicted"]
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"
    seconds = predicted["seconds"]
    lines = [
        f"{plan['name']}: {plan['parameters']:,} parameters on {plan['devices']} devices ({mesh})",
        f"batch {plan['batch']:,} x {plan['length']:,} = {plan['batch'] * plan['length']:,} tokens a step",
        "per device:",
        f"  parameters {gib(size['parameters'])}, optimizer {gib(size['optimizer'])}, temporaries {gib(size['temporaries'])}: "
        f"{gib(size['used'])} of {gib(size['hbm'])}, {plan['hbm_free']:.0%} free",
        f"  {plan['flops']['program'] / 1e12:.1f} TFLOP a step ({plan['flops']['program_times_passes'] / 1e12:.1f} times "
        f"passes; the model needs {plan['flops']['model'] / 1e12:.1f}), {plan['hbm_traffic_bytes'] / 1e9:.0f} GB of HBM traffic",
    ]
    lines += [
        f"  {c['kind']} over {c['axes']}: {c['count']:,} times, {c['bytes'] / 1e9:.2f} GB" for c in plan["collectives"]
    ]
    lines += [f"  {name} runs an unknown number of times and is counted once" for name in plan["unknown_loops"]]
    lines += [
        "predicted, not measured:",
        f"  compute {seconds['compute']:.2f} s, HBM {seconds['hbm']:.2f} s, interconnect {seconds['interconnect']:.2f} s, "
        f"network between slices {seconds.get('network', 0):.2f} s; bound by {predicted['bound_by']}",
    ]
    lines += [
        f"  {way.replace('_', ' ')}: {seconds[way]:.2f} s a step, {predicted['tokens_per_second'][way]:,.0f} tokens/s, model "
        f"FLOPs utilisation {predicted['utilisation'][way]:.0%}"
        for way in ("overlapped", "in_turn")
    ]
    return "\n".join(
        [*lines, f"compiled in {plan['compile_seconds']:.0f} s ({plan['compile_cpu_seconds']:.0f} s of CPU time)"]
    )


def search(arguments: config_lib.Arguments, name: str, folder: pathlib.Path) -> dict[str, Any]:
    """The plan with most predicted tokens/s among batch sizes and rematerialization policies that fit.

    Raises:
      DoesNotFit: none does.
    """
    options = arguments.options
    devices = len(chips.topology_devices(options.topology, options.slices))
    sizes = load(arguments).get("mesh", mesh_lib.MeshConfig()).sizes(devices)
    shards = sizes["data"] * sizes["fsdp"]
    best, refusal = None, None
    for policy in POLICIES:
        for rows in ROWS_PER_SHARD:
            run = load(arguments, f"BATCH_SIZE={rows * shards}", f"REMAT_POLICY={policy}")
            tried = f"{rows} rows a shard, rematerialization {policy!r}"
            try:
                plan = cached_plan(run, name, options.topology, options.slices, folder)
            except DoesNotFit as error:
                print(f"{tried}: does not fit")
                refusal = error
                break  # Nor will a larger batch.
            rate = plan["predicted"]["tokens_per_second"]["in_turn"]
            print(f"{tried}: {plan['hbm_free']:.0%} of HBM free, {rate:,.0f} tokens/s if nothing overlaps")
            if best is None or rate > best["predicted"]["tokens_per_second"]["in_turn"]:
                best = plan
    if best is None:
        raise refusal
    return best


def default_folder() -> pathlib.Path:
    """Where plans are kept unless --output_dir says otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(home) / "t5x_ssm" / "plans"


def _local_bytes(tree: Any) -> int:
    """Bytes of a tree's shards on one device."""
    return sum(
        jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype).size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _refusal(text: str, jaxpr: Any, count: int = 5) -> str:
    """What the compiler says, the largest arrays of the step, and what to do."""
    reason = re.search(r"RESOURCE_EXHAUSTED: (.*)", text)[1]
    largest = sorted(set(_arrays(jaxpr)), reverse=True)[:count]
    names = "\n".join(f"  {size / chips.GIB:8.2f} GiB  {shape}  {where}" for size, shape, where in largest)
    return (
        f"The step does not fit: {reason}\nThe largest arrays that it makes, as wholes over all devices:\n{names}\n"
        "Change BATCH_SIZE (fewer rows), REMAT_POLICY ('full' keeps least), TrainerConfig.num_microbatches, the axes of "
        "MeshConfig, or --topology."
    )


def _arrays(jaxpr: Any, path: str = "") -> Iterator[tuple[int, str, str]]:
    """(bytes, type and shape, where) of every intermediate array of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        where = "/".join(part for part in (path, str(equation.source_info.name_stack)) if part)
        for variable in equation.outvars:
            array = variable.aval
            if hasattr(array, "dtype") and not jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
                yield array.size * array.dtype.itemsize, array.str_short(), where
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from _arrays(inner, where)


def main(argv: Sequence[str]) -> int:
    """Plans what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5p:4x4x8")
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape, joined by the network")
    parser.add_argument("--search", action="store_true", help="try batch sizes and rematerialization policies")
    parser.add_argument(
        "--output_dir", type=pathlib.Path, default=default_folder(), help="where plans are kept as JSON"
    )
    arguments = config_lib.parse_arguments(argv, parser)
    options = arguments.options
    if not arguments.gin_files:
        raise UserError("Nothing to plan: give --gin_file=…, such as --gin_file=models/gss_7b.gin.")
    if options.slices < 1:
        raise UserError(f"--slices={options.slices}; there is at least one.")
    chips.parse_topology(options.topology)
    # Nothing is computed, and an accelerator that is here stays free.
    jax.config.update("jax_platforms", "cpu")
    name = pathlib.Path(arguments.gin_files[0]).stem
    if options.search:
        plan = search(arguments, name, options.output_dir)
    else:
        plan = cached_plan(load(arguments), name, options.topology, options.slices, options.output_dir)
    print(describe(plan))
    return 0


if __name__ == "__main__":
    config_lib.run_main(main)
