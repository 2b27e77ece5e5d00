import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm.ssm import scan

RNG = np.random.default_rng(0)
U = RNG.normal(size=(2, 7, 3)).astype(np.float32)
RESETS = RNG.random((2, 7)) < 0.3


def leaky_sum(u, state):
    state = {"sum": 0.5 * state["sum"] + u, "count": state["count"] + 1}
    return state["sum"] + state["count"][:, None], state


def start():
    return {"sum": jnp.ones((2, 3)), "count": jnp.zeros(2)}


def by_hand(u, resets):
    total, count, out = np.ones((2, 3)), np.zeros(2), []
    for l in range(u.shape[1]):
        total, count = np.where(resets[:, l, None], 0, total), np.where(resets[:, l], 0, count)
        total, count = 0.5 * total + u[:, l], count + 1
        out.append(total + count[:, None])
    return np.stack(out, 1), total, count


def test_recurrence_with_resets_and_reversed():
    for reverse in (False, True):
        flip = (lambda x: x[:, ::-1]) if reverse else (lambda x: x)
        y, state = scan.recurrence(leaky_sum, jnp.asarray(U), start(), jnp.asarray(RESETS), reverse=reverse)
        want, total, count = by_hand(flip(U), flip(RESETS))
        np.testing.assert_allclose(y, flip(want), rtol=1e-6)
        np.testing.assert_allclose(state["sum"], total, rtol=1e-6)
        np.testing.assert_array_equal(state["count"], count)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 50])
@pytest.mark.parametrize("resets", [None, RESETS], ids=["no resets", "resets"])
def test_chunks_are_the_whole(chunk_size, resets):
    def run(u, resets, state):
        assert u.shape[1] <= chunk_size
        return scan.recurrence(leaky_sum, u, state, resets)

    resets = None if resets is None else jnp.asarray(resets)
    y, state = scan.in_chunks(run, jnp.asarray(U), resets, start(), chunk_size)
    want, final = scan.recurrence(leaky_sum, jnp.asarray(U), start(), resets)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, final)


def test_chunks_need_a_token():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        scan.in_chunks(None, jnp.asarray(U), None, start(), 0)
