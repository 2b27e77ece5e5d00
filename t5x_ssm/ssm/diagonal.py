"""Banks of diagonal systems with one input each: GSS, DSS, S4D and H3's diagonal.

Channel h filters its own input u_h through N complex modes:

    x_h[l] = Ā_h x_h[l-1] + B̄_h u_h[l]        y_h[l] = Re(C_h · x_h[l]) + D_h u_h[l]

The papers differ in how they parameterise this, in what the channels share and in how time is discretised: one
constructor each. Everything after that is the same five ways to run a `Diagonal`. Their cost per token and channel, in
multiplications: `convolve` 4N for the kernel (once for the whole batch) and the FFT; `chunked` and `prefill` 4N more a
row, to read a state or write one; `scan` and `step` 12 N that do not parallelise over the length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm import scan as scans
from t5x_ssm.ssm.convolution import causal_convolution
from t5x_ssm.ssm.discretization import bilinear, divide, zoh
from t5x_ssm.ssm.powers import Pole, advance, modal_sum, moments, multiply, one_step, power, power_minus_one, repeated

DSS_KINDS = ("exp", "exp-re-im", "clip", "softmax")
DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}


class Diagonal(NamedTuple):
    """A discretised bank of H channels with N modes each.

    Attributes:
      pole: log Ā, fields [N] (shared by the channels) or [H, N].
      b_re, b_im: B̄, [N] or [H, N].
      c_re, c_im: C, [H, N]; it includes the factor 2 where a mode stands for a conjugate pair.
      d: the skip D, [H].
      horizon: None, or the length L to which DSS-softmax normalises its kernel, a float scalar. Then B̄ of a growing mode
        (log |Ā| > 0) is given as it stands at lag L-1, where it is largest, because at lag 0 it may underflow.
    """

    pole: Pole
    b_re: jax.Array
    b_im: jax.Array
    c_re: jax.Array
    c_im: jax.Array
    d: jax.Array
    horizon: jax.Array | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Parameterisations
# ---------------------------------------------------------------------------------------------------------------------


def gss(lambda_log_re, lambda_log_im, c_re, c_im, d, exp_imaginary: bool = True) -> Diagonal:
    """The simplified DSS of Gated State Spaces (2206.13947): Λ shared by the channels, Δ = 1, B = 1, zero-order hold.

    Args:
      lambda_log_re: [N], log(-Re Λ).
      lambda_log_im: [N], log Im Λ; Im Λ itself when `exp_imaginary` is False.
      c_re, c_im: [H, N].
      d: [H].
      exp_imaginary: whether the imaginary part is exponentiated too, as in the paper's listing.
    """
    frequency = double_float.exp(lambda_log_im) if exp_imaginary else lambda_log_im
    pole, gain = zoh(-jnp.exp(lambda_log_re), frequency, jnp.ones_like(lambda_log_re))
    return Diagonal(pole, *gain, c_re, c_im, d)


def dss(
    lambda_re,
    lambda_im,
    c_re,
    c_im,
    log_step,
    d,
    *,
    kind: str = "exp",
    scale: bool = True,
    length: int | None = None,
    largest_re: float = 1e-4,
) -> Diagonal:
    """Diagonal State Spaces (2203.14343): Λ shared by the channels, a time step per channel, no conjugate pairs.

    The kernel is Re Σ_n C_hn s_hn e^{l Δ_h Λ_n}, and the kinds differ in Λ and in the factor s:
      "exp":       Λ = -e^a + ib with parameters a, b;   s = (e^{ΔΛ} - 1)/Λ
      "exp-re-im": Λ = -e^a + ie^b;                      the same s
      "clip":      Λ = min(a, largest_re) + ib;          the same s
      "softmax":   Λ = a + ib;                           s = 1/(Λ Σ_{k<L} e^{kΔΛ}), a softmax over the lags

    The softmax is exact (no regulariser) and its gradient is that of the formula also where Re Λ > 0. Its normaliser
    knows the length, so it is another system at another length: it does not extrapolate, and to be run as a recurrence it
    must be told the length that it was trained with. Where Re Λ > 0 only `convolve` is exact at any growth; the recurrent
    ways need (L - 1) Re ΔΛ < 80, and no way can go beyond L tokens.

    Args:
      lambda_re, lambda_im: [N], the parameters a and b.
      c_re, c_im: [H, N].
      log_step: log Δ, [H], or [H, 2] for separate time steps of the real and the imaginary part.
      d: [H].
      kind: one of DSS_KINDS.
      scale: False sets s = 1 ("no scale").
      length: the kernel length L that "softmax" is normalised over.
      largest_re: the bound of "clip".

    Raises:
      ValueError: for an unknown kind, for "softmax" without `length` or with scale=False.
    """
    if kind not in DSS_KINDS:
        raise ValueError(f"unknown DSS kind {kind!r}; choose kind from {', '.join(DSS_KINDS)}")
    if kind == "softmax" and (length is None or not scale):
        raise ValueError(
            "DSS kind 'softmax' is a normalisation over the kernel's lags: set length, and leave scale=True"
        )
    re = {"clip": lambda: jnp.minimum(lambda_re, largest_re), "softmax": lambda: lambda_re}.get(
        kind, lambda: -jnp.exp(lambda_re)
    )()
    im = double_float.exp(lambda_im) if kind == "exp-re-im" else double_float.double(lambda_im)
    step, step_im = log_step[:, None], None
    if log_step.ndim == 2:
        step, step_im = log_step[:, :1], double_float.exp(log_step[:, 1:])
    pole, gain = zoh(re, im, double_float.exp(step), step_im)
    if kind == "softmax":
        gain = divide(*_softmax_weight(pole, length), re, im.high)
        return Diagonal(pole, *gain, c_re, c_im, d, jnp.asarray(length, pole.log_decay.dtype))
    if not scale:
        gain = jnp.ones_like(gain[0]), jnp.zeros_like(gain[1])
    return Diagonal(pole, *gain, c_re, c_im, d)


def s4d(
    a_log_re,
    a_im,
    b_re,
    b_im,
    c_re,
    c_im,
    log_step,
    d,
    *,
    discretization: str = "zoh",
    conjugate_pairs: bool = True,
) -> Diagonal:
    """S4D (2206.11893), and with "bilinear" the diagonal system of H3 (2212.14052): everything per channel.

    Args:
      a_log_re: log(-Re A), [H, N].
      a_im: Im A, [H, N].
      b_re, b_im: B, [H, N].
      c_re, c_im: C, [H, N].
      log_step: log Δ, [H].
      d: [H].
      discretization: "zoh" or "bilinear". They are not interchangeable: with Δ|A| near 10 the kernels have little in common.
      conjugate_pairs: each mode stands for itself and its conjugate, so that y = 2 Re(C·x).

    Raises:
      ValueError: for an unknown discretization.
    """
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"unknown discretization {discretization!r}; choose from {', '.join(DISCRETIZATIONS)}")
    pole, gain = DISCRETIZATIONS[discretization](-jnp.exp(a_log_re), a_im, double_float.exp(log_step[:, None]))
    factor = 2 if conjugate_pairs else 1
    return Diagonal(pole, *multiply(*gain, b_re, b_im), factor * c_re, factor * c_im, d)


# ---------------------------------------------------------------------------------------------------------------------
# DSS-softmax: modes that may grow
# ---------------------------------------------------------------------------------------------------------------------


def _inverse(pole: Pole) -> Pole:
    return Pole(*(-x for x in pole))


def _select(condition, pole: Pole, other: Pole) -> Pole:
    return Pole(*(jnp.where(condition, x, y) for x, y in zip(pole, other, strict=True)))


def _softmax_weight(pole: Pole, length):
    """1/Σ_{k<L} z^k with z = Ā of a decaying mode and 1/Ā of a growing one: the softmax at the lag where it is largest."""
    falling = _select(pole.log_decay > 0, _inverse(pole), pole)
    one, whole = (power_minus_one(falling, jnp.asarray(l, jnp.int32)) for l in (1, length))
    return divide(*one, *whole)


def _kernel_with_growth(system: Diagonal, length: int):
    """The kernel of a softmax system: decaying modes from the front, growing ones from the horizon backwards."""
    growing = system.pole.log_decay > 0
    weights = multiply(system.c_re, system.c_im, system.b_re, system.b_im)
    none = jax.tree.map(jnp.zeros_like, system.pole)
    front = modal_sum(*(jnp.where(growing, 0, w) for w in weights), _select(growing, none, system.pole), length)
    falling = _select(growing, _inverse(system.pole), none)
    last = power(falling, system.horizon.astype(jnp.int32) - length)
    back = modal_sum(*multiply(*(jnp.where(growing, w, 0) for w in weights), *last), falling, length)
    return front + back[:, ::-1]


def _input_gain(system: Diagonal):
    """B̄ as the recurrence uses it."""
    gain = system.b_re, system.b_im
    if system.horizon is None:
        return gain
    falling = _select(system.pole.log_decay > 0, _inverse(system.pole), jax.tree.map(jnp.zeros_like, system.pole))
    return multiply(*gain, *power(falling, system.horizon.astype(jnp.int32) - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The five ways to run
# ---------------------------------------------------------------------------------------------------------------------


def _cast(system: Diagonal, u):
    """The input in the type of the computation: float32 for bfloat16 activations, float64 under x64."""
    return u.astype(jnp.promote_types(u.dtype, system.d.dtype))


def zero_state(system: Diagonal, batch_size: int):
    """The state before any input: real and imaginary parts of x, each [B, H, N]."""
    zero = jnp.zeros((batch_size, *system.c_re.shape), system.c_re.dtype)
    return zero, zero


def kernel(system: Diagonal, length: int):
    """The impulse response without the skip, Re Σ_n C B̄ Ā^l for l = 0 … length-1: [H, length]."""
    if system.horizon is not None:
        return _kernel_with_growth(system, length)
    return modal_sum(*multiply(system.c_re, system.c_im, system.b_re, system.b_im), system.pole, length)


def _taps(system: Diagonal, length: int):
    """The impulse response with the skip, which is the response at lag 0."""
    return kernel(system, length).at[:, 0].add(system.d)


def convolve(system: Diagonal, u):
    """All outputs at once from zero state, by convolution. u and the result are [B, L, H], in u's type."""
    return causal_convolution(_cast(system, u), _taps(system, u.shape[1])).astype(u.dtype)


def bidirectional(system: Diagonal, backward: Diagonal, u, *, resets=None):
    """One system over the past and the present and another over the future, by convolution.

    y[l] = Σ_{s ≤ l} k[l-s] u[s] + Σ_{s > l} k'[s-l-1] u[s] + D u[l] with the kernels k of `system` and k' of `backward`, whose
    skip is not used: the layout of bidirectional S4 and DSS, where lag 0 belongs to the forward system alone.

    Args:
      system, backward: banks of the same H channels.
      u: [B, L, H].
      resets: bool [B, L], True where a document begins; then no output hears another document.

    Returns:
      y [B, L, H] in u's type.
    """
    length = u.shape[1]
    y = causal_convolution(
        _cast(system, u), _taps(system, length), anticausal_HL=kernel(backward, length), resets=resets
    )
    return y.astype(u.dtype)


def step(system: Diagonal, u, state):
    """One token: u [B, H] and a state to y [B, H] and the next state."""
    return _stepper(system)(u, state)


def scan(system: Diagonal, u, *, state=None, resets=None):
    """The recurrence, token after token: the reference for the other ways, slow and memory-bound for wide banks.

    Args:
      u: [B, L, H].
      state: what `zero_state` gives, or None for zero.
      resets: bool [B, L], True where the state before that token is zero.

    Returns:
      y [B, L, H] in u's type, and the state after the last token.
    """
    state = zero_state(system, u.shape[0]) if state is None else state
    return scans.recurrence(_stepper(system), u, state, resets)


def _stepper(system: Diagonal):
    one, gain = one_step(system.pole), _input_gain(system)

    def run(u, state):
        x = _cast(system, u)
        re, im = advance(one, state, [b * x[..., None] for b in gain])
        y = jnp.sum(system.c_re * re - system.c_im * im, axis=-1) + system.d * x
        return y.astype(u.dtype), (re, im)

    return run


# Tokens in a chunk unless the caller says otherwise.
CHUNK_SIZE = 2048


def chunked(system: Diagonal, u, *, state=None, resets=None, chunk_size: int | None = None):
    """Any length in bounded memory: a convolution inside each chunk, the state from chunk to chunk.

    With resets the convolution inside the chunk is exactly masked by document, and states do not cross a document's start.

    Args:
      u: [B, L, H].
      state: what `zero_state` gives, or None for zero.
      resets: bool [B, L], True where the state before that token is zero; None for nowhere, which is cheaper.
      chunk_size: tokens in a chunk; CHUNK_SIZE when None.

    Returns:
      y [B, L, H] in u's type, and the state after the last token.
    """
    chunk = CHUNK_SIZE if chunk_size is None else chunk_size
    taps = _taps(system, max(1, min(u.shape[1], chunk)))

    def run(u, resets, state):
        return _one_chunk(system, taps, u, resets, state)

    if u.shape[1] <= chunk:
        return run(u, resets, state)
    state = zero_state(system, u.shape[0]) if state is None else state
    return scans.in_chunks(run, u, resets, state, chunk)


def _one_chunk(system: Diagonal, taps, u, resets, state):
    length = u.shape[1]
    x = _cast(system, u)
    y = causal_convolution(x, taps[:, :length], resets=resets)
    if state is not None:
        ring = _ring(system, state, length)
        if resets is not None:
            document = jnp.cumsum(resets, axis=1)
            ring = jnp.where((document == 0)[..., None], ring, 0)
            state = scans.clear_state(state, document[:, -1] > 0)
        y = y + ring
    lengths = jnp.full((u.shape[0],), length, jnp.int32)
    return y.astype(u.dtype), _advance(system, scans.last_document(x, resets)[:, ::-1], lengths, state)


def handover(system: Diagonal, u, resets, doublings: int):
    """What a piece of a sequence tells the pieces after it, without its outputs.

    Args:
      u: [B, T, H].
      resets: bool [B, T] or None, as in `chunked`.
      doublings: how many of the maps are wanted.

    Returns:
      The state after the last token from a zero state, and maps from a state to what T, 2T, 4T … further steps without
      input make of it.
    """
    newest = scans.last_document(_cast(system, u), resets)
    end = multiply(*moments(jnp.swapaxes(newest[:, ::-1], 1, 2), system.pole), *_input_gain(system))
    return end, repeated(system.pole, u.shape[1], doublings)


def prefill(system: Diagonal, u, lengths, *, state=None):
    """Outputs at all positions, and the state after exactly lengths[b] tokens of row b.

    Args:
      u: [B, L, H].
      lengths: int [B], 0 … L.
      state: the state before the first token; None for zero.

    Returns:
      y [B, L, H] in u's type, and the state. Tokens at and after lengths[b] do not enter the state.
    """
    length = u.shape[1]
    x = _cast(system, u)
    y = causal_convolution(x, _taps(system, length))
    if state is not None:
        y = y + _ring(system, state, length)
    return y.astype(u.dtype), _advance(system, scans.backwards(x, lengths), lengths, state)


def _ring(system: Diagonal, state, length: int):
    """What an initial state adds to the outputs, Re(C Ā^{l+1} x): [B, L, H]."""
    weights = multiply(*multiply(*state, system.c_re, system.c_im), *power(system.pole, 1))
    return jnp.swapaxes(modal_sum(*weights, system.pole, length), 1, 2)


def _advance(system: Diagonal, backwards, lengths, state):
    """The state after lengths[b] more tokens, which are given last one first, zeros behind: [B, L, H]."""
    state_re, state_im = multiply(*moments(jnp.swapaxes(backwards, 1, 2), system.pole), *_input_gain(system))
    if state is not None:
        age = (jnp.moveaxis(x, -1, 0) for x in power(system.pole, lengths))  # [B, N] or [B, H, N]
        age = (x if x.ndim == 3 else x[:, None] for x in age)
        old_re, old_im = multiply(*state, *age)
        state_re, state_im = state_re + old_re, state_im + old_im
    return state_re, state_im
