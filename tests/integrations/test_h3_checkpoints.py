"""The public H3 format both ways, against a forward pass written out in NumPy from the public names alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny

from t5x_ssm.errors import UserError
from t5x_ssm.integrations import h3_checkpoints
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP, LayerNorm
from t5x_ssm.layers.h3 import H3
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import stored_tree

WIDTH, HIDDEN, VOCAB, TAPS, MODES, HEADS = 4, 6, 11, 4, 2, 2
PATTERN, DEPTH = "h3 attn h3", 3


def network(**settings):
    return Decoder(
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        pattern=PATTERN,
        mixers={
            "h3": functools.partial(H3, state_size=TAPS),
            "attn": functools.partial(Attention, num_heads=HEADS, use_bias=True),
        },
        mlp=functools.partial(MLP, hidden=HIDDEN, use_bias=True),
        norm=functools.partial(LayerNorm, epsilon=1e-5),
        **settings,
    )


def public_state(seed=0):
    """Random arrays under the names and shapes of the public module."""
    random = np.random.default_rng(seed)
    state = {}

    def add(name, *shape, scale=0.5):
        state[name] = (scale * random.normal(size=shape)).astype(np.float32)

    def linear(name, out, width):
        add(f"{name}.weight", out, width)
        add(f"{name}.bias", out)

    add("backbone.embeddings.word_embeddings.weight", VOCAB, WIDTH)
    for i, kind in enumerate(PATTERN.split()):
        layer = f"backbone.layers.{i}"
        for norm in ("norm1", "norm2"):
            add(f"{layer}.{norm}.weight", WIDTH)
            add(f"{layer}.{norm}.bias", WIDTH)
        linear(f"{layer}.mlp.fc1", HIDDEN, WIDTH)
        linear(f"{layer}.mlp.fc2", WIDTH, HIDDEN)
        mixer = f"{layer}.mixer"
        if kind == "attn":
            linear(f"{mixer}.Wqkv", 3 * WIDTH, WIDTH)
            linear(f"{mixer}.out_proj", WIDTH, WIDTH)
            continue
        for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
            linear(f"{mixer}.{name}", WIDTH, WIDTH)
        add(f"{mixer}.ssm_k_kernel.kernel.B", WIDTH, TAPS)
        add(f"{mixer}.ssm_k_kernel.kernel.C", 1, WIDTH, TAPS)
        add(f"{mixer}.ssm_k_D", WIDTH)
        add(f"{mixer}.kernel.kernel.B", WIDTH, MODES, 2)
        add(f"{mixer}.kernel.kernel.C", 1, WIDTH, MODES, 2)
        add(f"{mixer}.kernel.kernel.inv_A_real", WIDTH, MODES)
        add(f"{mixer}.kernel.kernel.A_imag", WIDTH, MODES, scale=3.0)
        add(f"{mixer}.kernel.kernel.log_dt", WIDTH)
        add(f"{mixer}.D", WIDTH)
    add("backbone.ln_f.weight", WIDTH)
    add("backbone.ln_f.bias", WIDTH)
    state["lm_head.weight"] = state["backbone.embeddings.word_embeddings.weight"]
    return state


def older(state):
    """The same under the names of the released files, whose norms stand after what is normalized."""
    renamed = {}
    for name, array in state.items():
        name = name.replace("backbone.ln_f", f"backbone.layers.{DEPTH - 1}.norm2_")
        for i in range(DEPTH):
            below = f"backbone.layers.{i - 1}.norm2_" if i else "backbone.norm"
            name = name.replace(f"backbone.layers.{i}.norm1.", f"{below}.")
            name = name.replace(f"backbone.layers.{i}.norm2.", f"backbone.layers.{i}.norm1_.")
        name = name.replace("norm1_", "norm1").replace("norm2_", "norm2")
        name = name.replace("backbone.embeddings.word_embeddings", "embedding").replace("backbone.", "s4seq.encoder.")
        renamed[name] = array
    return renamed


def reference(state, tokens):
    """Logits of tokens [L] in float64, by the recurrence of the public layer; each formula is that of its paper."""
    w = {name: array.astype(np.float64) for name, array in state.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def h3(x, name):
        q, k, v = (linear(x, f"{name}.{p}_proj") for p in "qkv")
        b, c = w[f"{name}.ssm_k_kernel.kernel.B"], w[f"{name}.ssm_k_kernel.kernel.C"][0]
        shifted, state = np.zeros_like(k), np.zeros((WIDTH, TAPS))
        for i, token in enumerate(k):
            state = np.pad(state, [(0, 0), (1, 0)])[:, :-1] + b * token[:, None]
            shifted[i] = (c * state).sum(-1) + w[f"{name}.ssm_k_D"] * token
        kernel = f"{name}.kernel.kernel"
        complex_ = lambda array: array[..., 0] + 1j * array[..., 1]
        a = -np.exp(w[f"{kernel}.inv_A_real"]) + 1j * w[f"{kernel}.A_imag"]
        step = np.exp(w[f"{kernel}.log_dt"])[:, None]
        decay, gain = (1 + step * a / 2) / (1 - step * a / 2), step * complex_(w[f"{kernel}.B"]) / (1 - step * a / 2)
        out, state = np.zeros_like(k), np.zeros((WIDTH, MODES), complex)
        for i, token in enumerate(shifted * v):
            state = decay * state + gain * token[:, None]
            out[i] = 2 * (complex_(w[f"{kernel}.C"])[0] * state).sum(-1).real + w[f"{name}.D"] * token
        return linear(q * out, f"{name}.output_linear")

    def attention(x, name):
        size = WIDTH // HEADS
        q, k, v = linear(x, f"{name}.Wqkv").reshape(len(x), 3, HEADS, size).transpose(1, 2, 0, 3)
        logits = np.where(np.tri(len(x), dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(size), -np.inf)
        mixed = (scipy.special.softmax(logits, axis=-1) @ v).transpose(1, 0, 2).reshape(len(x), WIDTH)
        return linear(mixed, f"{name}.out_proj")

    x = w["backbone.embeddings.word_embeddings.weight"][tokens]
    for i, kind in enumerate(PATTERN.split()):
        layer = f"backbone.layers.{i}"
        mixer = h3 if kind == "h3" else attention
        x = x + mixer(norm(x, f"{layer}.norm1"), f"{layer}.mixer")
        hidden = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")
        hidden = hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(hidden, f"{layer}.mlp.fc2")
    return norm(x, "backbone.ln_f") @ w["lm_head.weight"].T


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_public_state_gives_the_public_logits(scan_layers):
    state = public_state()
    net = network(scan_layers=scan_layers)
    arrays = h3_checkpoints.from_public(state, PATTERN, scan_layers)
    tokens = np.array([3, 7, 7, 1, 10, 0, 4])
    shapes = tiny.shapes(net, tokens[None], tokens[None], enable_dropout=False)["params"]
    assert {name: leaf.shape for name, leaf in stored_tree.flatten(shapes).items()} == {
        name: array.shape for name, array in arrays.items()
    }
    params = stored_tree.unflatten({name: jnp.asarray(array) for name, array in arrays.items()})
    logits = tiny.jit(lambda p: net.apply({"params": p}, tokens[None], tokens[None], enable_dropout=False))(params)
    expected = reference(state, tokens)
    np.testing.assert_allclose(logits[0], expected, atol=1e-5 * np.abs(expected).max())


def test_both_directions_and_both_generations_agree():
    state = public_state(1)
    arrays = h3_checkpoints.from_public(state, PATTERN)
    back = h3_checkpoints.to_public(arrays, PATTERN, DEPTH)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    released = older(state) | {"s4seq.encoder.layers.1.mixer.rotary_emb.inv_freq": np.ones(1)}
    assert "s4seq.encoder.norm.weight" in released and "backbone.ln_f.weight" not in released
    again = h3_checkpoints.from_public(released, PATTERN)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_repeated_layers_are_stacked_in_order():
    state = public_state()
    for name in [name for name in state if ".layers.1." in name]:
        del state[name]
    for name in [name for name in state if ".layers.2." in name]:
        state[name.replace(".layers.2.", ".layers.1.")] = state.pop(name)
    arrays = h3_checkpoints.from_public(state, "h3")
    for i in range(2):
        expected = state[f"backbone.layers.{i}.mixer.D"]
        np.testing.assert_array_equal(arrays["decoder/segment_0/block_0/mixer/ssm/d"][i], expected)
    assert h3_checkpoints.to_public(arrays, "h3", 2).keys() == state.keys()


def test_another_network_s_state_is_refused():
    state = public_state()
    arrays = h3_checkpoints.from_public(state, PATTERN)
    for change, message in (
        (lambda: h3_checkpoints.from_public(state, "h3"), "q_proj"),
        (lambda: h3_checkpoints.from_public(state, "h3 attn"), "repeat"),
        (lambda: h3_checkpoints.from_public(state | {"backbone.layers.0.mixer.E": np.ones(1)}, PATTERN), r"mixer\.E"),
        (lambda: h3_checkpoints.from_public(state | {"lm_head.weight": np.ones((VOCAB, WIDTH))}, PATTERN), "ties"),
        (lambda: h3_checkpoints.to_public(arrays, "attn h3 h3", 3), "pattern"),
    ):
        with pytest.raises(UserError, match=message):
            change()
