"""Whole layers beside each other: `python -m benchmarks.layers [--only=s5] [--repeats=7]`.

Forward and backward, gradients with respect to the input and all parameters, in float32; both sides in one process and in
turns. Seconds, the compiler's temporary memory and the time to compile. The process keeps the memory it frees, as training does
(`training.host_memory`). The sections:
  s5      S5's layer against the public formulation of it (complex numbers and an associative scan)
  gss     GSS's layer against DSS's at the same width, and networks of both of equal depth and width
  length  every state-space mixer: what a token costs, and memory, at 65,536 over 4,096 tokens
Writes benchmarks/results/layers_<section>.json.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import report, timing
from benchmarks.convolution import plain
from t5x_ssm.layers.basic import MLP
from t5x_ssm.layers.dss import DSS, DSSStateSpace
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D
from t5x_ssm.layers.s5 import S5
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training.host_memory import keep_freed_memory

BATCH, CHANNELS = 4, 256
LENGTHS = (1024, 4096, 16384)
COMPILATIONS = 7


def compare(ours: Callable, baseline: Callable, bound: Callable, parameters, lengths, repeats: int) -> dict:
    """Times two functions (parameters, u [B, L, H]) -> y of u's shape, which must agree, and their compilation.

    `bound`, of a length, gives a run of what neither can do without.
    """
    figures = {}
    for length in lengths:
        u = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, length, CHANNELS)), jnp.float32)

        def lower(function, u=u):
            def loss(parameters, u):
                y = function(parameters, u)
                return jnp.mean(jnp.square(y)), y

            return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(parameters, u)

        sides = {"ours": ours, "baseline": baseline}
        lowerings = {name: functools.partial(lower, function) for name, function in sides.items()}
        both = timing.in_turns(lowerings, COMPILATIONS, compiled)
        compiling, of_all_threads = ({name: [x[i] for x in taken] for name, taken in both.items()} for i in range(2))
        programs = {name: taken[-1][2] for name, taken in both.items()}
        found, expected = (program(parameters, u)[1] for program in programs.values())
        difference = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
        del found, expected
        runs = {name: functools.partial(program, parameters, u) for name, program in programs.items()}
        seconds = timing.in_turns(runs | {"bound": bound(length)}, repeats)
        memory = {name: program.memory_analysis().temp_size_in_bytes / 2**20 for name, program in programs.items()}
        figures[str(length)] = {
            name: {
                "compile_seconds": report.spread(compiling[name]),
                "compile_cpu_seconds": report.spread(of_all_threads[name]),
                "temporary_MiB": memory[name],
                "seconds": report.spread(seconds[name]),
            }
            for name in sides
        } | {
            "bound_seconds": report.spread(seconds["bound"]),
            "largest_difference": difference,
            "times_faster": timing.ratios(seconds["baseline"], seconds["ours"]),
            "bound_times_faster": timing.ratios(seconds["baseline"], seconds["bound"]),
            "compile_seconds_ratio": timing.ratios(compiling["ours"], compiling["baseline"]),
            "compile_cpu_seconds_ratio": timing.ratios(of_all_threads["ours"], of_all_threads["baseline"]),
            "temporary_MiB_ratio": memory["ours"] / memory["baseline"],
        }
    return figures


def compiled(lowering: Callable) -> tuple:
    """Seconds to compile by the clock, and of all threads, and the program."""
    lowered = lowering()
    began, spent = time.perf_counter(), time.process_time()
    program = lowered.compile()
    return time.perf_counter() - began, time.process_time() - spent, program


def associative_s5(parameters, u):
    """S5 as its public code computes it, GELU included: complex projections a token at a time, and an associative scan."""
    p = parameters["ssm"]
    poles, step = jax.lax.complex(p["lambda_re"], p["lambda_im"]), jnp.exp(p["log_step"])
    a = jnp.exp(poles * step)
    b = ((a - 1) / poles)[:, None] * jax.lax.complex(p["b_re"], p["b_im"])
    c = jax.lax.complex(p["c_re"], p["c_im"])

    def compose(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    def one_row(u):
        driven = jax.vmap(lambda token: b @ token)(u)
        _, states = jax.lax.associative_scan(compose, (a * jnp.ones((len(u), 1)), driven))
        return jax.vmap(lambda x, token: 2 * (c @ x).real + p["d"] * token)(states, u)

    return jax.nn.gelu(jax.vmap(one_row)(u))


def products(length: int) -> Callable:
    """What no S5 layer of this size can go below: its six products of real matrices, alone, as one program."""
    rows, shape = BATCH * length, (CHANNELS, CHANNELS)
    x, y, v, w = (jax.random.normal(jax.random.key(i), (rows, CHANNELS)) for i in range(4))
    b, c = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    six = jax.jit(lambda x, y, v, w, b, c: (x @ b, y @ c, v @ b, w @ c, x.T @ v, y.T @ w))
    return functools.partial(six, x, y, v, w, b, c)


def s5(repeats: int) -> dict:
    """S5 with 128 complex modes and a GELU; beside it the matrix products that it cannot do without."""
    layer = S5(state_size=256, output="gelu")
    parameters = jax.jit(lambda key: layer.init(key, jnp.zeros((1, 2, CHANNELS)))["params"])(jax.random.key(0))

    def ours(parameters, u):
        return layer.apply({"params": parameters}, u)

    return compare(ours, associative_s5, products, parameters, LENGTHS, repeats)


def written_out(next_function, arguments, keywords, context):
    """In place of DSS's state space, its kernel written out: an exponential for every channel, mode and lag.

    At 1,024 channels of 512 modes these are 8 GiB for 2,048 lags, so they are made for a group of channels at a time, and again
    for the backward pass.
    """
    module, group = context.module, 32
    if not isinstance(module, DSSStateSpace) or module.is_initializing() or context.method_name != "__call__":
        return next_function(*arguments, **keywords)
    p, (u, _) = module.variables["params"], arguments

    @jax.checkpoint
    def kernel(group):
        log_step, c_re, c_im = group
        poles = jax.lax.complex(-jnp.exp(p["lambda_re"]), p["lambda_im"])
        step = jnp.exp(log_step)
        exponent = jax.lax.complex(step[:, :1] * poles.real, step[:, 1:] * poles.imag)
        weights = jax.lax.complex(c_re, c_im) * (jnp.exp(exponent) - 1) / poles
        powers = jnp.exp(exponent[..., None] * jnp.arange(u.shape[1]))
        return jnp.einsum("hn,hnl->hl", weights, powers).real

    groups = [p[name].reshape(-1, group, p[name].shape[-1]) for name in ("log_step", "c_re", "c_im")]
    return plain(u, jax.lax.map(kernel, groups).reshape(u.shape[-1], -1)) + p["d"] * u, None


def gss(repeats: int) -> dict:
    """GSS at its published size against DSS of 512 modes at the same width of 1,024, as layers and as networks of two layers.

    DSS runs by our kernels, and with its kernel written out.
    """
    width, vocab, batch = 1024, 256, 2
    layers = {"gss": GSS(), "dss": DSS(state_size=512)}
    networks = {
        name: Decoder(vocab, width, name, num_layers=2, mlp=functools.partial(MLP, hidden=4 * width), mixers=mixers)
        for name, mixers in (
            ("gss", {"gss": GSS}),
            ("dss", {"dss": functools.partial(DSS, state_size=512, feed_forward=True)}),
        )
    }
    figures = {}
    for length in (2048, 4096):
        random = np.random.default_rng(0)
        activations = jnp.asarray(random.normal(size=(batch, length, width)), jnp.float32)
        tokens = jnp.asarray(random.integers(0, vocab, (batch, length)))
        for kind, modules, inputs in (("layers", layers, (activations,)), ("networks", networks, (tokens, tokens))):
            programs = {name: gradient_program(module, inputs) for name, module in modules.items()}
            with nn.intercept_methods(written_out):
                programs["dss_written_out"] = gradient_program(modules["dss"], inputs)
            seconds = timing.in_turns(
                {name: functools.partial(run, params, *inputs) for name, (run, params) in programs.items()}, repeats
            )
            figures[f"{kind}_{length}"] = {
                f"gss_times_faster_than_{name}": timing.ratios(seconds[name], seconds["gss"])
                for name in ("dss", "dss_written_out")
            } | {f"{name}_seconds": report.spread(values) for name, values in seconds.items()}
    return figures


def length(repeats: int) -> dict:
    """Growth of time and temporary memory per token with the length, at batch 1 and width 128."""
    width, short, long = 128, 4096, 65536
    mixers = {
        "gss": GSS(state_size=128),
        "dss": DSS(),
        "s4d": S4D(),
        "s4": S4(),
        "s5": S5(state_size=width),
        "h3": H3(),
    }
    figures = {}
    for name, module in mixers.items():
        runs, memory = {}, {}
        for tokens in (short, long):
            u = jnp.asarray(np.random.default_rng(0).normal(size=(1, tokens, width)), jnp.float32)
            program, parameters = gradient_program(module, (u,))
            memory[tokens] = program.memory_analysis().temp_size_in_bytes / 2**20
            runs[tokens] = functools.partial(program, parameters, u)
        seconds = timing.in_turns(runs, repeats)
        growth = [(a / long) / (b / short) for a, b in zip(seconds[long], seconds[short], strict=True)]
        figures[name] = {
            "cost_per_token_65536_over_4096": report.spread(growth),
            "microseconds_per_token": {
                str(n): report.spread([1e6 * s / n for s in values]) for n, values in seconds.items()
            },
            "temporary_MiB": {str(n): size for n, size in memory.items()},
        }
    return figures


def gradient_program(module, inputs):
    """The compiled gradient of a scalar of a module's output, and the parameters."""
    small = tuple(x[:1, :4] for x in inputs)
    parameters = jax.jit(lambda key: module.init(key, *small, enable_dropout=False)["params"])(jax.random.key(0))

    def loss(parameters, *inputs):
        return jnp.mean(jnp.square(module.apply({"params": parameters}, *inputs, enable_dropout=False)))

    floating = [i for i, x in enumerate((None, *inputs)) if x is None or jnp.issubdtype(x.dtype, jnp.floating)]
    return jax.jit(jax.grad(loss, argnums=floating)).lower(parameters, *inputs).compile(), parameters


SECTIONS = {"s5": s5, "gss": gss, "length": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    keep_freed_memory()
    for name, section in SECTIONS.items():
        if arguments.only in (None, name):
            report.write(f"layers_{name}", section(arguments.repeats))


if __name__ == "__main__":
    main()
