"""Banks of diagonal-plus-low-rank systems with one input each: S4 (2111.00396), as SPADE (2212.08136) uses it.

Channel h filters its own input through a state matrix that is normal but for one rank, A = diag(w) - p p^*. Its modes
come in conjugate pairs of which one of each is kept, so a state of real size M is N = M/2 complex numbers v, and A acts on
the real and imaginary parts as a real matrix: A v = w v - p 2Re(p^* v). The bilinear rule keeps that form,

    v[l] = Ā v[l-1] + B̄ u[l],   Ā v = ā v - β 2Re(γ·v)        y[l] = Re(C·v[l]) + D u[l]

with ā the bilinear image of w, so one token costs O(N). Many tokens at once need powers of Ā as a whole, which are those of
a dense matrix: `dplr_powers`; the impulse response is in `dplr_kernel`.

Cost in multiplications a channel: M³ for each of the log₂ L powers; M a lag for the kernel; `chunked` and `prefill` 2M
a token and row and 2M² a tile of √L tokens; `scan` and `step` 8M a token that do not parallelise over the length.

Shape suffixes as in `dplr_powers`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm import dplr_powers as dense
from t5x_ssm.ssm import scan as scans
from t5x_ssm.ssm.convolution import causal_convolution
from t5x_ssm.ssm.discretization import bilinear
from t5x_ssm.ssm.dplr_kernel import kernel, krylov
from t5x_ssm.ssm.dplr_powers import DPLR
from t5x_ssm.ssm.powers import multiply, one_step

# Tokens in a chunk of `chunked` unless the caller says otherwise.
CHUNK_SIZE = 2048


def s4(a_log_re, a_im, p_re, p_im, b_re, b_im, c_re, c_im, log_step, d) -> DPLR:
    """S4: A = diag(w) - p p^* with w = -e^{a_log_re} + i a_im, in conjugate pairs, by the bilinear rule.

    C is the parameter itself, not C (I - Ā^L) for the length L of training as in the first implementations, so the system
    does not depend on a length. Zero-order hold is not offered: it has no rank-one form.

    Args:
      a_log_re: log(-Re w), [N] (shared by the channels) or [H, N], as all of A and B.
      a_im: Im w.
      p_re, p_im: p.
      b_re, b_im: B.
      c_re, c_im: C, [H, N].
      log_step: log Δ, [H].
      d: [H].
    """
    step = double_float.exp(log_step[:, None])
    pole, gain = bilinear(-jnp.exp(a_log_re), a_im, step)
    shape = jnp.broadcast_shapes(c_re.shape, gain[0].shape)
    pole, gain, p, b = jax.tree.map(lambda x: jnp.broadcast_to(x, shape), (pole, gain, (p_re, p_im), (b_re, b_im)))
    # Woodbury: (I - ΔA/2)^-1 = D - (Δ/2) κ D p p^* D with D = 1/(1 - Δw/2), the gain over Δ. And Ā is 2 (I - ΔA/2)^-1 - I.
    root = jnp.sqrt(step.high)
    kappa = 1 / (1 + jnp.sum((jnp.square(p[0]) + jnp.square(p[1])) * gain[0], axis=-1, keepdims=True))
    d_p = tuple(x / root for x in multiply(*gain, *p))
    p_d = tuple(x / root for x in multiply(*gain, p[0], -p[1]))
    beta = kappa * d_p[0], kappa * d_p[1]
    # B̄ is Δ/2 (Ā + I) B.
    heard = step.high * jnp.sum(p_d[0] * b[0] - p_d[1] * b[1], axis=-1, keepdims=True)
    direct = multiply(*gain, *b)
    b_bar = direct[0] - beta[0] * heard, direct[1] - beta[1] * heard
    return DPLR(pole, *beta, *p_d, *b_bar, 2 * c_re, 2 * c_im, d)


def zero_state(system: DPLR, batch_size: int):
    """The state before any input: real and imaginary parts of v, each [B, H, N]."""
    zero = jnp.zeros((batch_size, *system.c_re.shape), system.c_re.dtype)
    return zero, zero


def _taps(system: DPLR, length: int):
    """The impulse response with the skip, which is the response at lag 0."""
    return kernel(system, length).at[:, 0].add(system.d)


def _cast(system: DPLR, u):
    """The input in the type of the computation: float32 for bfloat16 activations, float64 under x64."""
    return u.astype(jnp.promote_types(u.dtype, system.d.dtype))


def convolve(system: DPLR, u):
    """All outputs at once from zero state, by convolution. u and the result are [B, L, H], in u's type."""
    return causal_convolution(_cast(system, u), _taps(system, u.shape[1])).astype(u.dtype)


def bidirectional(system: DPLR, backward: DPLR, u, *, resets=None):
    """`system` over the past and the present, `backward` over the future; see `diagonal.bidirectional`."""
    length = u.shape[1]
    y = causal_convolution(
        _cast(system, u), _taps(system, length), anticausal_HL=kernel(backward, length), resets=resets
    )
    return y.astype(u.dtype)


def step(system: DPLR, u, state):
    """One token: u [B, H] and a state to y [B, H] and the next state."""
    return _stepper(system)(u, state)


def scan(system: DPLR, u, *, state=None, resets=None):
    """The recurrence, token after token: the reference for the other ways. Arguments and results as `diagonal.scan`."""
    state = zero_state(system, u.shape[0]) if state is None else state
    return scans.recurrence(_stepper(system), u, state, resets)


def _stepper(system: DPLR):
    a_re, a_im = one_step(system.pole)

    def run(u, state):
        x = _cast(system, u)
        coupled = 2 * jnp.sum(system.gamma_re * state[0] - system.gamma_im * state[1], axis=-1, keepdims=True)
        # The low part of ā joins what is added: it is far below the rounding of the large product.
        low = multiply(*state, a_re.low, a_im.low)
        added = (
            tail + (b * x[..., None] - beta * coupled)
            for tail, b, beta in zip(low, (system.b_re, system.b_im), (system.beta_re, system.beta_im), strict=True)
        )
        re, im = (large + small for large, small in zip(multiply(*state, a_re.high, a_im.high), added, strict=True))
        y = jnp.sum(system.c_re * re - system.c_im * im, axis=-1) + system.d * x
        return y.astype(u.dtype), (re, im)

    return run


class _Tables(NamedTuple):
    """What `chunked` and `prefill` need for up to L tokens.

    Attributes:
      powers: Ā^{2^k} - I for every bit of L, [bits, H, M, M].
      inputs: Ā^r B̄ for r = 0 … T-1, [H, M, T].
      outputs: C Ā^{r+1} for r = 0 … T-1, [H, T, M].
      taps: the impulse response with the skip, [H, L].
    """

    powers: jax.Array
    inputs: jax.Array
    outputs: jax.Array
    taps: jax.Array


def _tables(system: DPLR, length: int) -> _Tables:
    powers = dense.powers_minus_one(system, length.bit_length())
    tile = 1 << dense.tile_bits(length)
    row = dense.output_row(system)
    return _Tables(
        powers,
        dense.columns(powers, dense.input_column(system), tile),
        dense.rows(powers, row + dense.product("hri,hij->hrj", row, powers[0]), tile),
        krylov(system, powers, length).at[:, 0].add(system.d),
    )


def chunked(system: DPLR, u, *, state=None, resets=None, chunk_size: int | None = None):
    """Any length in bounded memory: a convolution inside each chunk, the state from chunk to chunk.

    Arguments and results as `diagonal.chunked`.
    """
    chunk = CHUNK_SIZE if chunk_size is None else chunk_size
    tables = _tables(system, max(1, min(u.shape[1], chunk)))

    def run(u, resets, state):
        return _one_chunk(system, tables, u, resets, state)

    if u.shape[1] <= chunk:
        return run(u, resets, state)
    state = zero_state(system, u.shape[0]) if state is None else state
    return scans.in_chunks(run, u, resets, state, chunk)


def _one_chunk(system: DPLR, tables: _Tables, u, resets, state):
    length = u.shape[1]
    x = _cast(system, u)
    y = causal_convolution(x, tables.taps[:, :length], resets=resets)
    if state is not None:
        ring = _ring(tables, state, length)
        if resets is not None:
            document = jnp.cumsum(resets, axis=1)
            ring = jnp.where((document == 0)[..., None], ring, 0)
            state = scans.clear_state(state, document[:, -1] > 0)
        y = y + ring
    lengths = jnp.full((u.shape[0],), length, jnp.int32)
    return y.astype(u.dtype), _advance(tables, scans.last_document(x, resets)[:, ::-1], lengths, state)


def handover(system: DPLR, u, resets, doublings: int):
    """What a piece of a sequence tells the pieces after it; see `diagonal.handover`."""
    length = u.shape[1]
    powers = dense.powers_minus_one(system, length.bit_length() + max(0, doublings - 1))
    inputs = dense.columns(powers, dense.input_column(system), 1 << dense.tile_bits(length))
    newest = scans.last_document(_cast(system, u), resets)
    end = dense.gather(powers, inputs, newest[:, ::-1])

    def over(steps):
        def run(state):
            v = jnp.concatenate(state, axis=-1)
            for k, power in enumerate(powers):
                if steps >> k & 1:
                    v = v + dense.product("hij,bhj->bhi", power, v)
            return tuple(jnp.split(v, 2, axis=-1))

        return run

    return tuple(jnp.split(end, 2, axis=-1)), [over(length << i) for i in range(doublings)]


def prefill(system: DPLR, u, lengths, *, state=None):
    """Outputs at all positions, and the state after exactly lengths[b] tokens of row b; see `diagonal.prefill`."""
    length = u.shape[1]
    tables = _tables(system, length)
    x = _cast(system, u)
    y = causal_convolution(x, tables.taps)
    if state is not None:
        y = y + _ring(tables, state, length)
    return y.astype(u.dtype), _advance(tables, scans.backwards(x, lengths), lengths, state)


def _ring(tables: _Tables, state, length: int):
    """What an initial state adds to the outputs, Re(C Ā^{l+1} v): [B, L, H]."""
    tile = tables.outputs.shape[1]
    tiles = -(-length // tile)
    at_tile = jnp.concatenate(state, axis=-1)[:, :, None]  # Ā^{qT} v, [B, H, Q, M]
    for power in tables.powers[tile.bit_length() - 1 :][: (tiles - 1).bit_length()]:
        at_tile = jnp.concatenate([at_tile, at_tile + dense.product("hij,bhqj->bhqi", power, at_tile)], axis=2)
    y = dense.product("htm,bhqm->bqth", tables.outputs, at_tile[:, :, :tiles])
    return y.reshape(y.shape[0], -1, y.shape[-1])[:, :length]


def _advance(tables: _Tables, backwards, lengths, state):
    """The state after lengths[b] more tokens, which are given last one first, zeros behind: [B, L, H]."""
    total = dense.gather(tables.powers, tables.inputs, backwards)
    if state is not None:
        old = jnp.concatenate(state, axis=-1)
        bits = lengths >> jnp.arange(len(tables.powers))[:, None] & 1

        def age(old, inputs):
            power, bit = inputs
            return jnp.where(bit[:, None, None] > 0, old + dense.product("hij,bhj->bhi", power, old), old), None

        total = total + lax.scan(age, old, (tables.powers, bits))[0]
    return tuple(jnp.split(total, 2, axis=-1))
