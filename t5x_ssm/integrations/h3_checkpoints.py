"""The format of the public H3 checkpoints (github.com/HazyResearch/H3), in both directions.

A public checkpoint is the state dict of a PyTorch module: linear weights are [output, input], attention keeps its query, key and
value projections in one, complex numbers have a last axis of 2, and layers are numbered. Here layers lie in the segments of
`models.pattern`, stacked where a segment repeats. Nothing is rounded: each direction only moves, transposes and splits arrays.

| public, in `backbone.layers.<i>`            | here, in a block                                   |
|---------------------------------------------|----------------------------------------------------|
| `norm1`, `norm2`                            | `mixer_norm`, `mlp_norm`                           |
| `mlp.fc1`, `mlp.fc2`                        | `mlp/wi`, `mlp/wo`                                 |
| `mixer.{q,k,v}_proj`, `mixer.output_linear` | `mixer/{query,key,value}`, `mixer/out`             |
| `mixer.ssm_k_kernel.kernel.{B,C}`, `ssm_k_D`| `mixer/shift_ssm/{b,c,d}`                          |
| `mixer.kernel.kernel.…`, `mixer.D`          | `mixer/ssm/…`                                      |
| `mixer.Wqkv`, `mixer.out_proj`              | `mixer/{query,key,value}`, `mixer/out` of attention|

The released files have older names and number their norms by what they follow; `from_public` takes these too. For a head_dim above 1 the
released weights were trained in a layout that only the trainer knows, see `layers.h3.H3.head_layout`.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_ssm.errors import UserError
from t5x_ssm.models import pattern as pattern_language

Arrays = dict[str, np.ndarray]

_EMBEDDING, _HEAD = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"
_NORM_LEAVES = (("scale", "weight"), ("bias", "bias"))
_NORMS = {"norm1": "mixer_norm", "norm2": "mlp_norm"}
_FEED_FORWARD = {"mlp.fc1": "mlp/wi", "mlp.fc2": "mlp/wo"}
_H3_PROJECTIONS = {
    "mixer.q_proj": "mixer/query",
    "mixer.k_proj": "mixer/key",
    "mixer.v_proj": "mixer/value",
    "mixer.output_linear": "mixer/out",
}
_DIAGONAL = "mixer.kernel.kernel"
_SHIFT = "mixer.ssm_k_kernel.kernel"
_H3_VECTORS = {
    f"{_DIAGONAL}.inv_A_real": "mixer/ssm/a_log_re",
    f"{_DIAGONAL}.A_imag": "mixer/ssm/a_im",
    f"{_DIAGONAL}.log_dt": "mixer/ssm/log_step",
    "mixer.D": "mixer/ssm/d",
    f"{_SHIFT}.B": "mixer/shift_ssm/b",
    "mixer.ssm_k_D": "mixer/shift_ssm/d",
}
_QKV = ("query", "key", "value")
# What a module recomputes from its settings, and is no parameter.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")


def read_file(path: pathlib.Path) -> Arrays:
    """The state dict in a .safetensors file, or in what `torch.save` wrote (then PyTorch must be installed).

    Raises:
      UserError: there is no such file, or no library that reads it.
    """
    if not path.is_file():
        raise UserError(f"--h3_state={path}: there is no such file.")
    if path.suffix == ".safetensors":
        try:
            import safetensors.numpy
        except ImportError:
            raise UserError(f"{path} needs the library safetensors; install t5x_ssm[export].") from None
        return safetensors.numpy.load_file(str(path))
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} was written by PyTorch, which is not installed; only .safetensors do without."
        ) from None
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: array.float().numpy() for name, array in state.items()}


def from_public(state: Mapping[str, np.ndarray], pattern: str, scan_layers: bool = True) -> Arrays:
    """A network's parameters from a public state dict.

    Args:
      state: arrays by their public names.
      pattern: which layers are `h3` and which `attn`, such as that of gin/networks/h3_125m.gin; repeated to the depth of `state`.
      scan_layers: whether the network has its segments stacked, as is its default.

    Returns:
      Arrays by name, for `integrations.stored_parameters.write` or a network of that pattern, of biased projections and LayerNorms.

    Raises:
      UserError: the state's layers are not those of the pattern, or it holds something that no layer has.
    """
    state = _renamed(state)
    numbers = {int(found[1]) for name in state if (found := re.match(r"backbone\.layers\.(\d+)\.", name))}
    layers = pattern_language.parse(pattern, len(numbers) or None, ("h3", "attn"))
    taken: set[str] = set()

    def take(name: str) -> np.ndarray:
        if name not in state:
            raise UserError(f"The checkpoint has no {name}: are its layers those of the pattern {pattern!r}?")
        taken.add(name)
        return np.asarray(state[name])

    blocks = [_block_from(lambda name, i=i: take(f"backbone.layers.{i}.{name}"), kind) for i, kind in enumerate(layers)]
    arrays = _stacked(blocks, layers, scan_layers)
    arrays |= {f"final_norm/{ours}": take(f"backbone.ln_f.{name}") for ours, name in _NORM_LEAVES}
    arrays["token_embedder/embedding"] = take(_EMBEDDING)
    if _HEAD in state and not np.array_equal(take(_HEAD), arrays["token_embedder/embedding"]):
        raise UserError(f"{_HEAD} is not {_EMBEDDING}: this network ties its logits to its embedding.")
    left = sorted(name for name in set(state) - taken if not _BUFFERS.search(name))
    if left:
        raise UserError(
            f"{len(left)} arrays of the checkpoint belong to no layer of {pattern!r}, among them {left[0]}."
        )
    return arrays


def to_public(arrays: Mapping[str, np.ndarray], pattern: str, num_layers: int, scan_layers: bool = True) -> Arrays:
    """A public state dict, in its newer names, from a network's parameters.

    Args:
      arrays: by name, as `integrations.stored_parameters.read` gives them.
      pattern, num_layers: the network's.
      scan_layers: as in `from_public`.

    Raises:
      UserError: the arrays are not those of such a network.
    """
    layers = pattern_language.parse(pattern, num_layers, ("h3", "attn"))
    blocks = _unstacked(arrays, layers, scan_layers)
    state = {_EMBEDDING: np.asarray(arrays["token_embedder/embedding"])}
    state[_HEAD] = state[_EMBEDDING]
    state |= {f"backbone.ln_f.{name}": np.asarray(arrays[f"final_norm/{ours}"]) for ours, name in _NORM_LEAVES}
    for i, (block, kind) in enumerate(zip(blocks, layers, strict=True)):
        state |= {f"backbone.layers.{i}.{name}": array for name, array in _block_to(block, kind).items()}
    return state


def _block_from(take, kind: str) -> Arrays:
    block = {
        f"{ours}/{leaf}": take(f"{public}.{name}") for public, ours in _NORMS.items() for leaf, name in _NORM_LEAVES
    }
    projections = _FEED_FORWARD | (_H3_PROJECTIONS if kind == "h3" else {"mixer.out_proj": "mixer/out"})
    for public, ours in projections.items():
        block[f"{ours}/kernel"] = take(f"{public}.weight").T
        block[f"{ours}/bias"] = take(f"{public}.bias")
    if kind == "attn":
        weights, biases = np.split(take("mixer.Wqkv.weight"), 3), np.split(take("mixer.Wqkv.bias"), 3)
        for name, weight, bias in zip(_QKV, weights, biases, strict=True):
            block[f"mixer/{name}/kernel"], block[f"mixer/{name}/bias"] = weight.T, bias
        return block
    block |= {ours: take(public) for public, ours in _H3_VECTORS.items()}
    block["mixer/shift_ssm/c"] = take(f"{_SHIFT}.C")[0]
    for name, planes in (("b", take(f"{_DIAGONAL}.B")), ("c", take(f"{_DIAGONAL}.C")[0])):
        block[f"mixer/ssm/{name}_re"], block[f"mixer/ssm/{name}_im"] = planes[..., 0], planes[..., 1]
    return block


def _block_to(block: Arrays, kind: str) -> Arrays:
    state = {
        f"{public}.{name}": block[f"{ours}/{leaf}"] for public, ours in _NORMS.items() for leaf, name in _NORM_LEAVES
    }
    projections = _FEED_FORWARD | (_H3_PROJECTIONS if kind == "h3" else {"mixer.out_proj": "mixer/out"})
    for public, ours in projections.items():
        state[f"{public}.weight"], state[f"{public}.bias"] = block[f"{ours}/kernel"].T, block[f"{ours}/bias"]
    if kind == "attn":
        state["mixer.Wqkv.weight"] = np.concatenate([block[f"mixer/{name}/kernel"].T for name in _QKV])
        state["mixer.Wqkv.bias"] = np.concatenate([block[f"mixer/{name}/bias"] for name in _QKV])
        return state
    state |= {public: block[ours] for public, ours in _H3_VECTORS.items()}
    state[f"{_SHIFT}.C"] = block["mixer/shift_ssm/c"][None]
    state[f"{_DIAGONAL}.B"] = np.stack([block["mixer/ssm/b_re"], block["mixer/ssm/b_im"]], axis=-1)
    state[f"{_DIAGONAL}.C"] = np.stack([block["mixer/ssm/c_re"], block["mixer/ssm/c_im"]], axis=-1)[None]
    return state


def _places(layers: Sequence[str], scan_layers: bool) -> list[tuple[str, int | None]]:
    """Of every layer, the prefix of its arrays' names, and its index along their first axis (None: they have none)."""
    places: list[tuple[str, int | None]] = []
    for i, segment in enumerate(pattern_language.segments(layers)):
        for repetition in range(segment.repeats):
            for j in range(len(segment.period)):
                folder = f"decoder/segment_{i}" if scan_layers else f"decoder/segment_{i}_{repetition}"
                places.append((f"{folder}/block_{j}/", repetition if scan_layers else None))
    return places


def _stacked(blocks: Sequence[Arrays], layers: Sequence[str], scan_layers: bool) -> Arrays:
    found: dict[str, list[np.ndarray]] = {}
    for block, (prefix, _) in zip(blocks, _places(layers, scan_layers), strict=True):
        for name, array in block.items():
            found.setdefault(prefix + name, []).append(array)
    return {name: np.stack(parts) if scan_layers else parts[0] for name, parts in found.items()}


def _unstacked(arrays: Mapping[str, np.ndarray], layers: Sequence[str], scan_layers: bool) -> list[Arrays]:
    blocks = []
    for (prefix, index), kind in zip(_places(layers, scan_layers), layers, strict=True):
        mine = {name.removeprefix(prefix): np.asarray(a) for name, a in arrays.items() if name.startswith(prefix)}
        if ("mixer/ssm/c_re" in mine) != (kind == "h3"):
            raise UserError(
                f"The arrays under {prefix} are not those of a layer {kind!r}; is the pattern the network's?"
            )
        blocks.append(mine if index is None else {name: array[index] for name, array in mine.items()})
    return blocks


def _renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state under its newer names.

    The older module normalized after each sublayer what the next one reads, so its norm k is the newer module's k + 1: one before
    all layers, `norm1` of a layer for its feed-forward block, `norm2` for the layer above.
    """
    named = {}
    for name, array in state.items():
        name = re.sub(r"^s4seq\.encoder\.", "backbone.", name)
        name = re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", name)
        named[name] = array
    if "backbone.norm.weight" not in named:
        return named

    def moved(name: str) -> str:
        if found := re.fullmatch(r"backbone\.norm\.(\w+)", name):
            return f"backbone.layers.0.norm1.{found[1]}"
        if found := re.fullmatch(r"backbone\.layers\.(\d+)\.norm1\.(\w+)", name):
            return f"backbone.layers.{found[1]}.norm2.{found[2]}"
        if found := re.fullmatch(r"backbone\.layers\.(\d+)\.norm2\.(\w+)", name):
            above = f"backbone.layers.{int(found[1]) + 1}."
            kept = any(other.startswith(above) for other in named)
            return f"{above}norm1.{found[2]}" if kept else f"backbone.ln_f.{found[2]}"
        return name

    return {moved(name): array for name, array in named.items()}
