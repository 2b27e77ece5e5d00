"""S5's system: one diagonal state that all channels drive and read (Simplified State Space Layers, 2208.04933).

    x[l] = Ā x[l-1] + B̄ u[l]        y[l] = Re(C x[l]) + D u[l]

with x in C^P, u and y in R^H: against the banks of `diagonal`, which hold H·N numbers of state, this one holds P, so that
running all states over the sequence is cheap beside the two projections. These are products with real matrices: the real
and imaginary parts of the state are 2P real components, [Re x, Im x]. All ways to run but `step` are one scan; the cost
per token is 4 P H multiplications, a third of a complex formulation's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from t5x_ssm.ssm import double_float
from t5x_ssm.ssm import scan as scans
from t5x_ssm.ssm.diagonal_scan import states
from t5x_ssm.ssm.discretization import bilinear, divide, zoh
from t5x_ssm.ssm.double_float import Double
from t5x_ssm.ssm.powers import Pole, advance, moments, multiply, one_step, power_minus_one, repeated

DISCRETIZATIONS = ("zoh", "bilinear")

# The largest Re Λ under `clip_eigs`.
LARGEST_RE = -1e-4


class MultiInput(NamedTuple):
    """A discretised system with P complex modes and H channels.

    Attributes:
      pole: log Ā, fields [P].
      b_re, b_im: B̄, [P, H].
      c_re, c_im: C, [H, P]; it includes the factor 2 where a mode stands for a conjugate pair.
      d: the skip D, [H].
      whole_turns: [P], the whole turns a step that `pole` leaves out of Im ΔΛ. Only steps of other sizes need them;
        None where those are undefined (bilinear).
    """

    pole: Pole
    b_re: jax.Array
    b_im: jax.Array
    c_re: jax.Array
    c_im: jax.Array
    d: jax.Array
    whole_turns: jax.Array | None = None


def s5(
    lambda_re,
    lambda_im,
    b_re,
    b_im,
    c_re,
    c_im,
    log_step,
    d,
    *,
    discretization: str = "zoh",
    conjugate_pairs: bool = True,
    clip_eigs: bool = False,
    step_rescale: float = 1.0,
) -> MultiInput:
    """Discretises S5's parameters (sections 3.2 and D.3 of the paper).

    Args:
      lambda_re, lambda_im: Λ, [P].
      b_re, b_im: B, [P, H].
      c_re, c_im: C, [H, P].
      log_step: log Δ, [P]: one time step per mode.
      d: [H].
      discretization: "zoh" or "bilinear".
      conjugate_pairs: each mode stands for itself and its conjugate, so that y = 2 Re(C x).
      clip_eigs: Re Λ is at most -10⁻⁴, so that no mode grows; a clipped mode's Re Λ has no gradient.
      step_rescale: multiplies Δ; r runs a system on input that is sampled r times more coarsely.

    Raises:
      ValueError: for an unknown discretization.
    """
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"unknown discretization {discretization!r}; choose from {', '.join(DISCRETIZATIONS)}")
    if clip_eigs:
        lambda_re = jnp.where(lambda_re < LARGEST_RE, lambda_re, LARGEST_RE)
    step = double_float.exp(log_step)
    if step_rescale != 1:
        step = double_float.multiply(step, double_float.constant(step_rescale, log_step.dtype))
    whole_turns = None
    if discretization == "zoh":
        pole, gain = zoh(lambda_re, lambda_im, step)
        whole_turns = lax.stop_gradient(jnp.round(step.high * lambda_im / (2 * jnp.pi) - pole.turns))
    else:
        pole, gain = bilinear(lambda_re, lambda_im, step)
    # Spread before it is used twice, so that its gradient is one sum over channels.
    b = multiply(*(jnp.broadcast_to(x[:, None], b_re.shape) for x in gain), b_re, b_im)
    factor = 2 if conjugate_pairs else 1
    return MultiInput(pole, *b, factor * c_re, factor * c_im, d, whole_turns)


# ---------------------------------------------------------------------------------------------------------------------
# Between channels and modes
# ---------------------------------------------------------------------------------------------------------------------


def _cast(system: MultiInput, u):
    """The input in the type of the computation: float32 for bfloat16 activations, float64 under x64."""
    return u.astype(jnp.promote_types(u.dtype, system.d.dtype))


# The projections see all tokens as rows of one matrix, and their own matrices are put together from parts as these are
# kept, [outputs, inputs]. Then the gradient of a matrix is (cotangents)ᵀ (rows), and nothing has to be transposed; for
# batched rows or for matrices of transposed parts XLA on CPU begins by transposing, the sequence or each part.


def _matmul(rows, matrix, activations):
    """rows [R, I] and matrix [O, I] to [R, O]."""
    # Accelerators multiply float32 in passes of bfloat16. Where the activations are bfloat16 anyway, three passes keep
    # twice their digits; float32 takes six.
    precision = lax.Precision.HIGH if activations.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum("ri,oi->ro", rows, matrix, precision=precision)


def _enter(system: MultiInput, u):
    """B̄u as planes: [..., H] to [..., 2, P]."""
    matrix = jnp.concatenate([system.b_re, system.b_im])  # [2P, H]
    return _matmul(_cast(system, u).reshape(-1, u.shape[-1]), matrix, u).reshape(*u.shape[:-1], 2, -1)


def _leave(system: MultiInput, x, u, backward=None):
    """Re(C x) + D u: planes [..., 2, P] to [..., H]; `backward` is another (C, x), whose contribution is added."""
    pairs = [(system.c_re, system.c_im, x)] + ([] if backward is None else [(*backward[0], backward[1])])
    rows = _cast(system, u).reshape(-1, u.shape[-1])
    y = system.d * rows
    for c_re, c_im, planes in pairs:
        modes = c_re.shape[1]
        # Side by side; as a sum, because XLA on CPU makes programs of a concatenation of columns and of each of its parts.
        matrix = jnp.pad(c_re, [(0, 0), (0, modes)]) - jnp.pad(c_im, [(0, 0), (modes, 0)])
        y = y + _matmul(planes.reshape(len(rows), -1), matrix, u)
    return y.reshape(u.shape).astype(u.dtype)


def _planes(state):
    return jnp.stack(state, axis=1)


def _pair(planes):
    return planes[:, 0], planes[:, 1]


# ---------------------------------------------------------------------------------------------------------------------
# The ways to run
# ---------------------------------------------------------------------------------------------------------------------


def zero_state(system: MultiInput, batch_size: int):
    """The state before any input: real and imaginary parts of x, each [B, P]."""
    zero = jnp.zeros((batch_size, *system.pole.log_decay.shape), system.d.dtype)
    return zero, zero


def _all_states(system: MultiInput, u, state, resets, reverse=False):
    state = None if state is None else _planes(state)
    return states(system.pole, _enter(system, u), state, resets, reverse)


def convolve(system: MultiInput, u):
    """All outputs at once from zero state. u and the result are [B, L, H], in u's type."""
    return _leave(system, _all_states(system, u, None, None), u)


def scan(system: MultiInput, u, *, state=None, resets=None, step_scale=None):
    """The recurrence over a whole sequence.

    Args:
      u: [B, L, H].
      state: what `zero_state` gives, or None for zero.
      resets: bool [B, L], True where the state before that token is zero.
      step_scale: [B, L], the time between a token and the one before it, in units of Δ, for input that is sampled
        irregularly: Ā = e^{sΔΛ} and B̄ accordingly, a token at a time. None for regular sampling, which is much faster.

    Returns:
      y [B, L, H] in u's type, and the state after the last token.

    Raises:
      ValueError: for `step_scale` with a system that is not discretised by zero-order hold.
    """
    if step_scale is not None:
        return _irregular_scan(system, u, state, resets, step_scale)
    x = _all_states(system, u, state, resets)
    return _leave(system, x, u), _pair(x[:, -1])


def _irregular_scan(system, u, state, resets, step_scale):
    if system.whole_turns is None:
        raise ValueError("step_scale needs discretization='zoh': only then is a step of another size Ā to that power")
    one = divide(jnp.ones_like(system.d[:1]), 0, *power_minus_one(system.pole, 1))

    def step(inputs, x):
        token, scale = inputs
        a, gain = _longer_step(system, scale[:, None])
        v_re, v_im = token[:, 0], token[:, 1]
        rotated, entering = multiply(*x, *a), multiply(v_re, v_im, *multiply(*gain, *one))
        x = rotated[0] + entering[0], rotated[1] + entering[1]
        return _planes(x), x

    state = zero_state(system, u.shape[0]) if state is None else state
    x, state = scans.recurrence(step, (_enter(system, u), _cast(system, step_scale)), state, resets)
    return _leave(system, x, u), state


def _longer_step(system, scale):
    """Ā^s and Ā^s - 1 for real s: [B, 1] to pairs of [B, P]."""
    fraction = double_float.multiply(Double(system.pole.turns, system.pole.turns_low), scale)
    whole = double_float.reduce_turns(double_float.multiply(system.whole_turns, scale))
    turns = double_float.reduce_turns(double_float.add(fraction, whole))
    exponent = system.pole.log_decay * scale
    angle = 2 * jnp.pi * (turns.high + turns.low)
    size = jnp.exp(exponent)
    a = size * jnp.cos(angle), size * jnp.sin(angle)
    return a, (jnp.expm1(exponent) - 2 * size * jnp.sin(angle / 2) ** 2, a[1])


# Tokens in a chunk unless the caller says otherwise: the states of a chunk are 8 P bytes a token.
CHUNK_SIZE = 16384


def chunked(system: MultiInput, u, *, state=None, resets=None, chunk_size: int | None = None):
    """Any length in bounded memory: the states of one chunk at a time.

    Args:
      u: [B, L, H].
      state: what `zero_state` gives, or None for zero.
      resets: bool [B, L], True where the state before that token is zero; None for nowhere.
      chunk_size: tokens in a chunk; CHUNK_SIZE when None. Beyond one chunk the backward pass makes the states again.

    Returns:
      y [B, L, H] in u's type, and the state after the last token.
    """
    chunk = CHUNK_SIZE if chunk_size is None else chunk_size

    def run(u, resets, state):
        return scan(system, u, state=state, resets=resets)

    if u.shape[1] <= chunk:
        return run(u, resets, state)
    state = zero_state(system, u.shape[0]) if state is None else state
    return scans.in_chunks(run, u, resets, state, chunk)


def handover(system: MultiInput, u, resets, doublings: int):
    """What a piece of a sequence tells the pieces after it; see `diagonal.handover`."""
    backwards = scans.last_document(_enter(system, u), resets)[:, ::-1]  # [B, T, 2, P]
    # One channel of one mode for each mode: [2, B, P, T] and back.
    each_mode = Pole(*(x[:, None] for x in system.pole))
    re, im = (x[..., 0] for x in moments(jnp.moveaxis(backwards, (2, 1), (0, -1)), each_mode))
    end = re[0] - im[1], im[0] + re[1]
    return end, repeated(system.pole, u.shape[1], doublings)


def prefill(system: MultiInput, u, lengths, *, state=None):
    """Outputs at all positions, and the state after exactly lengths[b] tokens of row b.

    Args:
      u: [B, L, H].
      lengths: int [B], 0 … L.
      state: the state before the first token; None for zero.

    Returns:
      y [B, L, H] in u's type, and the state. Tokens at and after lengths[b] do not enter the state.
    """
    x = _all_states(system, u, state, None)
    state = zero_state(system, u.shape[0]) if state is None else state
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None, None], axis=1)[:, 0]
    last = jnp.where((lengths > 0)[:, None, None], last, _planes(state))
    return _leave(system, x, u), _pair(last)


def step(system: MultiInput, u, state):
    """One token: u [B, H] and a state to y [B, H] and the next state."""
    state = advance(one_step(system.pole), state, _pair(_enter(system, u)))
    return _leave(system, _planes(state), u), state


def bidirectional(system: MultiInput, backward: MultiInput, u, *, resets=None):
    """y[l] = Re(C x[l] + C' x'[l]) + D u[l], where x' runs backwards: x'[l] = Ā x'[l+1] + B̄ u[l].

    Both states hold the current token.

    Args:
      system: the system.
      backward: the same system with the matrix C' for C; nothing else of it is read.
      u: [B, L, H].
      resets: bool [B, L], True where a document begins; no state of either direction passes there.

    Returns:
      [B, L, H] in u's type.
    """
    v = _enter(system, u)
    ahead, back = (states(system.pole, v, None, resets, reverse) for reverse in (False, True))
    return _leave(system, ahead, u, ((backward.c_re, backward.c_im), back))
