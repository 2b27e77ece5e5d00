"""What every mixer promises, whatever it computes: a mixer is covered by one line of `MIXERS`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning
from tiny import draw, jit, shapes

from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gated_operator import GatedOperator
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D, S4StateSpace
from t5x_ssm.layers.s5 import S5, S5StateSpace
from t5x_ssm.layers.spade import Spade
from t5x_ssm.parallel import rules

WIDTH, LENGTH = 8, 12
# Three documents of lengths 1, 5 and 4 and two tokens of padding; then two documents that end at the row's end.
SEGMENTS = np.array([[1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 0, 0], [1] * 7 + [2] * 5])


@dataclasses.dataclass(frozen=True)
class Case:
    """One mixer.

    Attributes:
      build: makes the mixer.
      reach: how many tokens the mixer sees at most, itself included; None for all.
      chunk: the mixer sees nothing of earlier chunks of this length.
    """

    build: Any
    reach: int | None = None
    chunk: int | None = None


MIXERS = {
    "gss": Case(functools.partial(GSS, channels=4, hidden=12, state_size=3)),
    "h3": Case(functools.partial(H3, state_size=4)),
    "h3 heads": Case(functools.partial(H3, head_dim=2, state_size=4)),
    "s4": Case(functools.partial(S4, state_size=4)),
    "s4d": Case(functools.partial(S4D, state_size=4, output="linear")),
    "dss": Case(functools.partial(DSS, state_size=3)),
    "spade": Case(
        functools.partial(
            Spade,
            state_space=functools.partial(S4StateSpace, state_size=4, step_min=0.1, step_max=0.5),
            attention=functools.partial(Attention, num_heads=2, span="sliding", window=4, relative_bias=True),
        )
    ),
    "s5": Case(functools.partial(S5, state_size=4)),
    "s5op": Case(
        functools.partial(GatedOperator, state_space=functools.partial(S5StateSpace, state_size=6, conj_sym=False))
    ),
    "attn": Case(functools.partial(Attention, num_heads=4, num_kv_heads=2, relative_bias=True, relative_buckets=6)),
    "swa": Case(functools.partial(Attention, num_heads=2, span="sliding", window=4, rotary=True), reach=4),
    "chunk": Case(functools.partial(Attention, num_heads=2, span="chunk", window=5, relative_bias=True), chunk=5),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


@functools.cache
def mixer(name, **fields):
    """The mixer and random parameters for it."""
    layer = MIXERS[name].build(**fields)
    return layer, draw(shapes(layer, inputs())["params"])


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


@functools.cache
def full(name):
    """The outputs of `inputs()` at once, from nothing."""
    layer, params = mixer(name)
    run = jit(lambda x: layer.apply({"params": params}, x, enable_dropout=False))
    return np.asarray(run(inputs()))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
@every_mixer
def test_prefill_in_pieces_and_then_steps_is_the_full_forward(name):
    layer, params = mixer(name)
    x = jnp.asarray(inputs())
    piece = 5
    lengths = jnp.asarray([[0, 5], [0, 2]])  # per piece and row: the rows have read 0 and 7 tokens
    variables = {"params": params}

    @jit
    def run(x):
        _, created = layer.apply(variables, x, enable_dropout=False, decode=True, mutable=["cache"])

        def prefill(cache, part_and_length):
            part, n = part_and_length
            y, updated = layer.apply(
                {**variables, "cache": cache},
                part,
                enable_dropout=False,
                prefill=True,
                prefill_lengths=n,
                mutable=["cache"],
            )
            return updated["cache"], y

        parts = jnp.stack([x[:, :piece], x[:, piece : 2 * piece]])
        cache, prefilled = jax.lax.scan(prefill, created["cache"], (parts, lengths))

        def step(carry, _):
            cache, count = carry
            token = jnp.take_along_axis(x, jnp.minimum(count, LENGTH - 1)[:, None, None], axis=1)
            wanted = (count < LENGTH).astype(jnp.int32)
            y, updated = layer.apply(
                {**variables, "cache": cache},
                token,
                enable_dropout=False,
                decode=True,
                prefill_lengths=wanted,
                mutable=["cache"],
            )
            return (updated["cache"], count + wanted), y[:, 0]

        _, stepped = jax.lax.scan(step, (cache, lengths.sum(0)), length=LENGTH)
        return created["cache"], jnp.concatenate([*prefilled], axis=1), jnp.swapaxes(stepped, 0, 1)

    created, prefilled, stepped = run(x)
    expected = full(name)
    for leaf in jax.tree.leaves(created):
        assert leaf.ndim and leaf.shape[0] == 2, "batch is the first axis of every cache leaf"
        assert not np.any(leaf), "creating the cache consumes nothing"
    # The outputs of a prefill are right up to the first token that is not consumed.
    close(prefilled[0, :1], expected[0, :1])
    close(prefilled[1, : piece + 3], expected[1, : piece + 3])
    close(stepped[0], expected[0])
    close(stepped[1, : LENGTH - 7], expected[1, 7:])


@every_mixer
def test_a_packed_batch_gives_what_its_documents_give_alone(name):
    layer, params = mixer(name)
    x = jnp.asarray(inputs())

    @jit
    def both(x):
        packed = layer.apply({"params": params}, x, segment_ids=jnp.asarray(SEGMENTS), enable_dropout=False)
        # Every document of the batch, moved to the start of a row of its own.
        rows = []
        for b, segments in enumerate(SEGMENTS):
            for s in dict.fromkeys(segments[segments > 0]):
                first, size = int(np.argmax(segments == s)), int((segments == s).sum())
                rows.append(jnp.pad(x[b, first : first + size], [(0, LENGTH - size), (0, 0)]))
        return packed, layer.apply({"params": params}, jnp.stack(rows), enable_dropout=False)

    packed, alone = both(x)
    alone = iter(alone)
    for b, segments in enumerate(SEGMENTS):
        for s in dict.fromkeys(segments[segments > 0]):
            where = segments == s
            close(packed[b, where], next(alone)[: where.sum()])


@every_mixer
def test_each_output_depends_on_the_past_and_on_nothing_else(name):
    layer, params = mixer(name)
    case = MIXERS[name]
    at = 8

    @jit
    def gradient(x):
        return jax.grad(lambda x: layer.apply({"params": params}, x, enable_dropout=False)[0, at].sum())(x)

    sizes = np.abs(gradient(inputs())).max(-1)
    assert not sizes[1].any(), "rows of a batch are apart"
    seen = [
        j <= at and (case.reach is None or at - j < case.reach) and (case.chunk is None or j // case.chunk == at // case.chunk)
        for j in range(LENGTH)
    ]  # fmt: skip
    seen = np.array(seen)
    assert (sizes[0][seen] > 1e-5 * sizes.max()).all()
    # What the FFT spills into the future is rounding.
    assert (sizes[0][~seen] < 1e-6 * sizes.max()).all()


@every_mixer
def test_padding_changes_nothing_before_or_after_it(name):
    layer, params = mixer(name)
    mask = np.ones((2, LENGTH), np.int32)
    mask[0, 9:] = 0
    x = inputs()
    filled = np.where(mask[..., None] > 0, x, 5.0).astype(np.float32)
    run = jit(lambda x: layer.apply({"params": params}, x, padding_mask=jnp.asarray(mask), enable_dropout=False))
    close(run(filled)[0, :9], full(name)[0, :9])
    close(run(filled)[1], full(name)[1])


def subjaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: isinstance(p, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr))
        ):
            if isinstance(parameter, jax.extend.core.ClosedJaxpr):
                parameter = parameter.jaxpr
            if isinstance(parameter, jax.extend.core.Jaxpr):
                yield from subjaxprs(parameter)


# Operations that only state spaces have, and of which none may lose bits.
RECURRENT = {"fft", "exp", "expm1", "cos", "sin", "log1p"}


@every_mixer
def test_bfloat16_activations_leave_the_state_space_in_float32(name):
    layer, params = mixer(name, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    x = jnp.asarray(inputs(), jnp.bfloat16)

    def run(params, x):
        y, updated = layer.apply(
            {"params": params}, x, enable_dropout=False, prefill=True, mutable=["cache"],
            prefill_lengths=jnp.asarray([3, 4]),
        )  # fmt: skip
        return layer.apply({"params": params}, x, enable_dropout=False), y, updated["cache"]

    y, prefilled, cache = jax.eval_shape(run, params, x)
    assert y.dtype == prefilled.dtype == jnp.bfloat16
    if any("ssm" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
        states = [
            leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cache) if "ssm" in jax.tree_util.keystr(path)
        ]
        assert states and all(leaf.dtype == jnp.float32 for leaf in states)
        found = 0
        for jaxpr in subjaxprs(jax.make_jaxpr(run)(params, x).jaxpr):
            for equation in jaxpr.eqns:
                if equation.primitive.name in RECURRENT - {"exp", "expm1", "log1p"}:
                    found += 1
                    assert all(v.aval.dtype != jnp.bfloat16 for v in equation.invars), equation
        assert found, "no kernel was found in the program"


@every_mixer
def test_every_parameter_and_cache_leaf_has_known_logical_axes(name):
    variables = shapes(mixer(name)[0], inputs(), decode=True)
    for collection in ("params", "cache"):
        names = partitioning.get_axis_names(variables[f"{collection}_axes"])
        names = {
            tuple(k.key for k in path): tuple(axes)
            for path, axes in jax.tree_util.tree_leaves_with_path(
                dict(names), is_leaf=lambda n: not hasattr(n, "items")
            )
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables[collection]):
            axes = names[tuple(k.key for k in path)]
            assert len(axes) == leaf.ndim
            rules.mesh_axes(axes)  # an unknown name raises
