"""Banks of diagonal-plus-low-rank systems with one input each: S4 (2111.00396), as SPADE (2212.08136) uses it.

Channel h filters its own input through a state matrix that is normal but for one rank, A = diag(w) - p p^*. Its modes
come in conjugate pairs of which one of each is kept, so a state of real size M is N = M/2 complex numbers v, and A acts on
the real and imaginary parts as a real matrix: A v = w v - p 2Re(p^* v). The bilinear rule keeps that form,

    v[l] = Ā v[l-1] + B̄ u[l],   Ā v = ā v - β 2Re(γ·v)        y[l] = Re(C·v[l]) + D u[l]

with ā the bilinear image of w, so one token costs O(N). Many tokens at once need powers of Ā as a whole. It cannot be
diagonalised: the eigenvectors of HiPPO-LegS have a condition near 10¹⁵ at M = 64. But where Re w < 0 it is a contraction,
and a power of two of it is well conditioned as a dense real matrix,

    Ā^{2^k} = diag(ā^{2^k}) + S_k,   S_{k+1} = ā^{2^k} S_k + S_k ā^{2^k} + S_k²

where the diagonal is exact at any length and only what the low rank adds is squared. From these come short tables of Ā^r B̄
and C Ā^{qT}, and a kernel, a final state or the ringing of an initial one is a real matrix product of tables.

Cost in multiplications a channel: M³ for each of the log₂ L powers; M a lag for the kernel; `chunked` and `prefill` 2M
a token and row and 2M² a tile of √L tokens; `scan` and `step` 8M a token that do not parallelise over the length.

Shape suffixes: B batch, H channels, N kept modes, M = 2N real components, L length, T steps in a tile, Q tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm import scan as scans
from t5x_ssm.ssm.convolution import causal_convolution
from t5x_ssm.ssm.discretization import bilinear
from t5x_ssm.ssm.double_float import value_with_derivative_of
from t5x_ssm.ssm.powers import Pole, multiply, one_step, power_minus_one

KERNEL_METHODS = ("krylov", "cauchy")

# Elements of one power of the channels whose kernels are made at once, and made again in the backward pass: 2^20 float32
# are 4 MiB, and there are log₂ L powers.
GROUP_ELEMENTS = 1 << 20

# Complex elements of the largest array of a group of frequencies of the Cauchy kernel: 2^20 complex64 are 8 MiB.
CAUCHY_GROUP_ELEMENTS = 1 << 20

# Tokens in a chunk of `chunked` unless the caller says otherwise.
CHUNK_SIZE = 2048


class DPLR(NamedTuple):
    """A discretised bank of H channels with N kept modes each.

    Attributes:
      pole: log ā, fields [H, N].
      beta_re, beta_im, gamma_re, gamma_im: the rank-one part of Ā, [H, N].
      b_re, b_im: B̄, [H, N].
      c_re, c_im: 2C, [H, N]: a mode stands for a conjugate pair.
      d: the skip D, [H].
    """

    pole: Pole
    beta_re: jax.Array
    beta_im: jax.Array
    gamma_re: jax.Array
    gamma_im: jax.Array
    b_re: jax.Array
    b_im: jax.Array
    c_re: jax.Array
    c_im: jax.Array
    d: jax.Array


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


# ---------------------------------------------------------------------------------------------------------------------
# Powers of the dense Ā, and tables of them
# ---------------------------------------------------------------------------------------------------------------------


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision=lax.Precision.HIGHEST)


def _coupling(system: DPLR):
    """S_0 = Ā - diag(ā) on [re; im]: [H, M, M]."""
    column = jnp.concatenate([system.beta_re, system.beta_im], axis=-1)
    row = jnp.concatenate([system.gamma_re, -system.gamma_im], axis=-1)
    return -2 * column[:, :, None] * row[:, None, :]


def _from_left(alpha, s):
    """diag(α) S for complex α, a pair of [..., N], and a real matrix S on [re; im], [..., M, M]."""
    top, bottom = jnp.split(s, 2, axis=-2)
    return jnp.concatenate(multiply(*(x[..., :, None] for x in alpha), top, bottom), axis=-2)


def _from_right(alpha, s):
    """S diag(α); arguments as `_from_left`."""
    left, right = jnp.split(s, 2, axis=-1)
    re, im = (x[..., None, :] for x in alpha)
    return jnp.concatenate(multiply(re, -im, left, right), axis=-1)


def _powers(system: DPLR, count: int):
    """Ā^{2^k} - I for k = 0 … count-1, [count, H, M, M]: less the identity, which keeps the digits of slow systems."""
    exponents = jnp.asarray(1 << np.arange(count), jnp.int32)
    alpha = tuple(jnp.moveaxis(x, -1, 0) for x in power_minus_one(system.pole, exponents))  # ā^{2^k} - 1, [count, H, N]
    first = _coupling(system)

    def square(s, alpha):
        s = 2 * s + _from_left(alpha, s) + _from_right(alpha, s) + _product("hij,hjk->hik", s, s)
        return s, s

    couplings = first[None]
    if count > 1:
        _, later = lax.scan(square, first, jax.tree.map(lambda x: x[:-1], alpha))
        couplings = jnp.concatenate([couplings, later])
    return couplings[:count] + _from_left(alpha, jnp.eye(first.shape[-1], dtype=first.dtype))


def _tile_bits(length: int) -> int:
    """log₂ of the steps in a tile, about half of log₂ length."""
    return ((length - 1).bit_length() + 1) // 2


def _columns(powers, first, count: int):
    """first [H, M, 1] and what Ā^r makes of it: [H, M, count] for r = 0 … count-1, count a power of two."""
    table = first
    for power in powers[: count.bit_length() - 1]:
        table = jnp.concatenate([table, table + _product("hij,hjr->hir", power, table)], axis=-1)
    return table


def _rows(powers, first, count: int):
    """first [H, 1, M] times powers of the matrix that powers[0] stands for: [H, count, M]."""
    table = first
    for power in powers[: (count - 1).bit_length()]:
        table = jnp.concatenate([table, table + _product("hri,hij->hrj", table, power)], axis=1)
    return table[:, :count]


def _output_row(system: DPLR):
    """C as a row on [re; im]: [H, 1, M]."""
    return jnp.concatenate([system.c_re, -system.c_im], axis=-1)[:, None]


def _input_column(system: DPLR):
    """B̄ as a column on [re; im]: [H, M, 1]."""
    return jnp.concatenate([system.b_re, system.b_im], axis=-1)[..., None]


# ---------------------------------------------------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------------------------------------------------


def kernel(system: DPLR, length: int, *, method: str = "krylov"):
    """The impulse response without the skip, Re(C Ā^l B̄) for l = 0 … length-1.

    Args:
      system: the bank.
      length: L, at least 1.
      method: "krylov", products of tables of Ā^r B̄ and C Ā^{qT}; or "cauchy", S4's: the response at the L-th roots of
        unity by Cauchy sums and Woodbury's identity, and an inverse FFT.

    Returns:
      [H, length].

    Raises:
      ValueError: for an unknown method.
    """
    if method not in KERNEL_METHODS:
        raise ValueError(f"unknown kernel method {method!r}; choose method from {', '.join(KERNEL_METHODS)}")

    def run(system):
        if method == "krylov":
            return _krylov_kernel(system, _powers(system, (length - 1).bit_length()), length)
        return _cauchy_kernel(system, _powers(system, length.bit_length()), length)

    channels, modes = system.c_re.shape
    wanted = max(1, GROUP_ELEMENTS // (2 * modes) ** 2)
    group = max(g for g in range(1, channels + 1) if channels % g == 0 and g <= wanted)
    if group == channels:
        return run(system)
    grouped = jax.tree.map(lambda x: x.reshape(channels // group, group, *x.shape[1:]), system)
    return lax.map(jax.checkpoint(run), grouped).reshape(channels, length)


def _krylov_kernel(system: DPLR, powers, length: int):
    bits = _tile_bits(length)
    inputs = _columns(powers, _input_column(system), 1 << bits)
    outputs = _rows(powers[bits:], _output_row(system), -(-length >> bits))
    return _product("hqm,hmt->hqt", outputs, inputs).reshape(-1, outputs.shape[1] << bits)[:, :length]


def _cauchy_kernel(system: DPLR, powers, length: int):
    """Σ_l C Ā^l B̄ z^l = C̃ (I - zĀ)^-1 B̄ with C̃ = C (I - Ā^L) wherever z^L = 1, and the inverse transform of that.

    With R = 1/(1 - zā) on the modes and on their conjugates, (I - zĀ)^-1 = R - zRβ γᵀR / (1 + z γᵀRβ). S4 writes the same
    numbers as 2/(1 + z) times a Cauchy matrix 1/(g(z) - w), which is singular at z = -1; this is not.
    """
    row = end = _output_row(system)
    for k, power in enumerate(powers):
        if length >> k & 1:
            end = end + _product("hri,hij->hrj", end, power)
    c_tilde_re, minus_c_tilde_im = jnp.split((row - end)[:, 0] / 2, 2, axis=-1)
    left = (c_tilde_re, -minus_c_tilde_im), (system.gamma_re, system.gamma_im)
    right = (system.b_re, system.b_im), (system.beta_re, system.beta_im)
    weights = jnp.stack([lax.complex(*multiply(*x, *y)) for x in left for y in right], axis=1)[
        ..., None
    ]  # [H, 4, N, 1]
    conjugate = Pole(system.pole.log_decay, -system.pole.turns, -system.pole.turns_low)

    @jax.checkpoint
    def response(points):
        resolvent, other = (1 / _one_minus(pole, points)[:, None] for pole in (system.pole, conjugate))
        sums = jnp.sum(weights * resolvent + weights.conj() * other, axis=2)
        c_b, c_beta, gamma_b, gamma_beta = (sums[:, i] for i in range(4))
        z = lax.complex(points.cosine, points.sine)
        return c_b - z * c_beta * gamma_b / (1 + z * gamma_beta)

    points = _points(length, system.c_re.dtype)
    count = length // 2 + 1
    group = max(1, min(count, CAUCHY_GROUP_ELEMENTS // weights.size))
    groups = -(-count // group)
    points = jax.tree.map(lambda x: np.pad(x, (0, groups * group - count)).reshape(groups, group), points)
    spectrum = jnp.moveaxis(lax.map(response, points), 0, 1).reshape(-1, groups * group)[:, :count]
    return jnp.fft.irfft(spectrum, length)


class _Points(NamedTuple):
    """Points z = e^{-2πi t} of the unit circle.

    Attributes:
      whole, rest: t·2³² rounded down, as a wrapping int32, and what that leaves over.
      turns: t.
      cosine, sine: z.
    """

    whole: jax.Array
    rest: jax.Array
    turns: jax.Array
    cosine: jax.Array
    sine: jax.Array


def _points(length: int, dtype) -> _Points:
    """The L-th roots of unity with t = 0 … 1/2, numpy fields [L // 2 + 1]."""
    k = np.arange(length // 2 + 1, dtype=np.int64)
    z = np.exp(-2j * np.pi * k / length)
    whole, rest = np.divmod(k << 32, length)
    floats = (x.astype(dtype) for x in (rest / length, k / length, z.real, z.imag))
    return _Points(whole.astype(np.uint32).view(np.int32), *floats)


def _one_minus(pole: Pole, points: _Points):
    """1 - āz, with all digits also where z is close to 1/ā: complex [H, N, points]."""
    # Both angles in integer fractions of a turn, so that their difference is exact.
    turns, low = lax.stop_gradient((pole.turns[..., None], pole.turns_low[..., None]))
    scaled = turns * 2.0**32
    whole = jnp.round(scaled)
    rest = (scaled - whole) + low * 2.0**32
    whole = jnp.where(whole >= 2.0**31, whole - 2.0**32, whole).astype(jnp.int32)
    fraction = ((whole - points.whole).astype(turns.dtype) + (rest - points.rest)) * 2.0**-32
    angle = 2 * jnp.pi * value_with_derivative_of(fraction, pole.turns[..., None] - points.turns)
    log_size = pole.log_decay[..., None]
    size = jnp.exp(log_size)
    return lax.complex(2 * size * jnp.square(jnp.sin(angle / 2)) - jnp.expm1(log_size), -size * jnp.sin(angle))


def _taps(system: DPLR, length: int):
    """The impulse response with the skip, which is the response at lag 0."""
    return kernel(system, length).at[:, 0].add(system.d)


# ---------------------------------------------------------------------------------------------------------------------
# The five ways to run
# ---------------------------------------------------------------------------------------------------------------------


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
    powers = _powers(system, length.bit_length())
    tile = 1 << _tile_bits(length)
    row = _output_row(system)
    return _Tables(
        powers,
        _columns(powers, _input_column(system), tile),
        _rows(powers, row + _product("hri,hij->hrj", row, powers[0]), tile),
        _krylov_kernel(system, powers, length).at[:, 0].add(system.d),
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
    powers = _powers(system, length.bit_length() + max(0, doublings - 1))
    inputs = _columns(powers, _input_column(system), 1 << _tile_bits(length))
    newest = scans.last_document(_cast(system, u), resets)
    end = _gather(powers, inputs, newest[:, ::-1])

    def over(steps):
        def run(state):
            v = jnp.concatenate(state, axis=-1)
            for k, power in enumerate(powers):
                if steps >> k & 1:
                    v = v + _product("hij,bhj->bhi", power, v)
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
        at_tile = jnp.concatenate([at_tile, at_tile + _product("hij,bhqj->bhqi", power, at_tile)], axis=2)
    y = _product("htm,bhqm->bqth", tables.outputs, at_tile[:, :, :tiles])
    return y.reshape(y.shape[0], -1, y.shape[-1])[:, :length]


def _advance(tables: _Tables, backwards, lengths, state):
    """The state after lengths[b] more tokens, which are given last one first, zeros behind: [B, L, H]."""
    total = _gather(tables.powers, tables.inputs, backwards)
    if state is not None:
        old = jnp.concatenate(state, axis=-1)
        bits = lengths >> jnp.arange(len(tables.powers))[:, None] & 1

        def age(old, inputs):
            power, bit = inputs
            return jnp.where(bit[:, None, None] > 0, old + _product("hij,bhj->bhi", power, old), old), None

        total = total + lax.scan(age, old, (tables.powers, bits))[0]
    return tuple(jnp.split(total, 2, axis=-1))


def _gather(powers, inputs, backwards):
    """Σ_l Ā^l B̄ u[l] for u [B, L, H], with `powers` and `inputs` as in `_Tables`: [B, H, M]."""
    batch, length, channels = backwards.shape
    tile = inputs.shape[-1]
    tiles = -(-length // tile)
    u = jnp.pad(backwards, [(0, 0), (0, tiles * tile - length), (0, 0)]).reshape(batch, tiles, tile, channels)
    states = _product("hmt,bqth->bhqm", inputs, u)
    # Σ_q Ā^{qT} states[q], pairs at a time.
    for power in powers[tile.bit_length() - 1 :][: (tiles - 1).bit_length()]:
        states = jnp.pad(states, [(0, 0), (0, 0), (0, states.shape[2] % 2), (0, 0)])
        later = states[:, :, 1::2]
        states = states[:, :, ::2] + later + _product("hij,bhqj->bhqi", power, later)
    return states[:, :, 0]
