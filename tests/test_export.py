"""Models out of run folders and back, and means of checkpoints, against the arrays that were saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_ssm import average, export
from t5x_ssm.errors import UserError
from t5x_ssm.integrations import stored_parameters
from t5x_ssm.training import checkpoints, restoring, stored_tree

pytest.importorskip("safetensors")
SHAPES = {"token_embedder/embedding": (7, 4), "decoder/segment_0/block_0/mixer/ssm/d": (2, 4), "final_norm/scale": (4,)}
VOCABULARY = {"name": "ByteVocabulary", "size": 259, "hash": "ab"}


def parameters(seed):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def save(folder, steps, vocabulary=VOCABULARY, **changed):
    """A run folder with a whole state at each step, and the parameters of each."""
    saved = {}
    with checkpoints.Checkpointer(folder) as checkpointer:
        for step in steps:
            arrays = saved[step] = parameters(step) | changed
            target = stored_tree.unflatten({name: jnp.asarray(array) for name, array in arrays.items()})
            state = {"step": jnp.asarray(step), "param_states": {"mu": target}}
            checkpointer.save(step, {"target": target, "state": state}, {}, {"vocabulary": vocabulary, "loop": [step]})
    return saved


def restored(path, shapes=SHAPES):
    host = jnp.zeros(()).sharding
    wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=host) for name, shape in shapes.items()}
    found = restoring.restore_parameters(str(path), stored_tree.unflatten(wanted))
    return {name: np.asarray(leaf) for name, leaf in stored_tree.flatten(found.params).items()}, found.metadata


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saved = save(folder, (3, 5, 8))
    (folder / "config.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom t5x_ssm.models import decoder\n"
        "MODEL_DIR = 'elsewhere'\nWIDTH = 4\ndecoder.Decoder.embed_dim = %WIDTH\ndecoder.Decoder.vocab_size = 7\n"
    )
    return folder, saved


def test_an_exported_model_is_the_newest_checkpoint_s_parameters(run, tmp_path):
    import safetensors.numpy

    folder, saved = run
    assert export.main([f"--model_dir={folder}", f"--output_dir={tmp_path}/out"]) == 0
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == SHAPES.keys()
    for name, array in saved[8].items():
        np.testing.assert_array_equal(stored[name], array)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described == {
        "format": "t5x_ssm 1",
        "num_parameters": 7 * 4 + 2 * 4 + 4,
        "step": 8,
        "vocabulary": VOCABULARY,
        "network": {"decoder.Decoder.embed_dim": "4", "decoder.Decoder.vocab_size": "7"},
    }
    with pytest.raises(UserError, match="--output_dir"):
        export.main([f"--model_dir={folder}", f"--output_dir={tmp_path}/out"])


def test_a_model_comes_back_as_a_run_folder(run, tmp_path):
    folder, saved = run
    export.main([f"--model_dir={folder}/checkpoint_5", f"--output_dir={tmp_path}/out"])
    assert export.main([f"--input_dir={tmp_path}/out", f"--output_dir={tmp_path}/back"]) == 0
    arrays, metadata = restored(tmp_path / "back")
    for name, array in saved[5].items():
        np.testing.assert_array_equal(arrays[name], array)
    assert metadata == {"vocabulary": VOCABULARY}
    assert (tmp_path / "back" / "config.gin").read_text() == (folder / "config.gin").read_text()
    assert [path.name for path in (tmp_path / "back").glob("checkpoint_*")] == ["checkpoint_5"]


def test_bfloat16_rounds_all_but_state_spaces(run, tmp_path):
    folder, saved = run
    export.main([f"--model_dir={folder}", f"--output_dir={tmp_path}/out", "--dtype=bfloat16"])
    export.main([f"--input_dir={tmp_path}/out", f"--output_dir={tmp_path}/back"])
    arrays, _ = restored(tmp_path / "back")
    for name, array in saved[8].items():
        expected = array if "/ssm/" in name else array.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(arrays[name], expected)
    with pytest.raises(UserError, match="--dtype"):
        export.main([f"--input_dir={tmp_path}/out", f"--output_dir={tmp_path}/new", "--dtype=float32"])


def test_half_a_model_is_refused(run, tmp_path):
    folder, _ = run
    export.main([f"--model_dir={folder}", f"--output_dir={tmp_path}/out"])
    config = tmp_path / "out" / "config.json"
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        export.main([f"--input_dir={tmp_path}/out", f"--output_dir={tmp_path}/back"])
    (tmp_path / "out" / "model.safetensors").write_bytes(whole)
    config.write_text(config.read_text().replace('"num_parameters": 40', '"num_parameters": 41'))
    with pytest.raises(UserError, match="41"):
        export.main([f"--input_dir={tmp_path}/out", f"--output_dir={tmp_path}/back"])
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        export.main([f"--input_dir={tmp_path}/out", f"--output_dir={tmp_path}/back"])


def test_a_mean_is_numpy_s(run, tmp_path):
    folder, saved = run
    assert average.main([f"--model_dir={folder}", "--last=2", f"--output_dir={tmp_path}/two"]) == 0
    arrays, metadata = restored(tmp_path / "two" / "checkpoint_8")
    for name in SHAPES:
        expected = np.mean([saved[step][name].astype(np.float64) for step in (5, 8)], axis=0).astype(np.float32)
        np.testing.assert_array_equal(arrays[name], expected)
    assert metadata["vocabulary"] == VOCABULARY and len(metadata["average_of"]) == 2
    assert (tmp_path / "two" / "config.gin").exists()

    paths = ",".join(f"{folder}/checkpoint_{step}" for step in (8, 3, 5))
    assert average.main([f"--checkpoints={paths}", f"--output_dir={tmp_path}/three"]) == 0
    arrays, _ = restored(tmp_path / "three")
    expected = np.mean([saved[step]["final_norm/scale"].astype(np.float64) for step in (3, 5, 8)], axis=0)
    np.testing.assert_allclose(arrays["final_norm/scale"], expected, rtol=1e-7)


def test_what_has_no_mean_is_refused(run, tmp_path):
    folder, _ = run
    save(tmp_path / "narrow", (3,), **{"final_norm/scale": np.zeros(3, np.float32)})
    save(tmp_path / "other", (3,), vocabulary=VOCABULARY | {"hash": "cd"})
    for flags, message in (
        ([f"--model_dir={folder}", "--last=4"], "--last=4"),
        ([f"--checkpoints={folder}/checkpoint_3"], "at least two"),
        ([f"--checkpoints={folder}/checkpoint_3,{tmp_path}/narrow"], "final_norm/scale"),
        ([f"--checkpoints={folder}/checkpoint_3,{tmp_path}/other"], "vocabularies"),
        ([f"--checkpoints={folder}/checkpoint_3,{folder}/checkpoint_4"], "checkpoint_4"),
    ):
        with pytest.raises(UserError, match=message):
            average.main([*flags, f"--output_dir={tmp_path}/mean"])


def test_a_public_h3_file_becomes_a_run_folder(tmp_path):
    import safetensors.numpy

    random = np.random.default_rng(0)
    shapes = {f"backbone.layers.0.{norm}.{leaf}": (4,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
    shapes |= {f"backbone.ln_f.{leaf}": (4,) for leaf in ("weight", "bias")}
    shapes |= {"backbone.embeddings.word_embeddings.weight": (5, 4)}
    sizes = {"mlp.fc1": (8, 4), "mlp.fc2": (4, 8), "mixer.Wqkv": (12, 4), "mixer.out_proj": (4, 4)}
    for name, (out, width) in sizes.items():
        shapes |= {f"backbone.layers.0.{name}.weight": (out, width), f"backbone.layers.0.{name}.bias": (out,)}
    state = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    flags = [f"--h3_state={tmp_path}/model.safetensors", f"--output_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="--pattern"):
        export.main(flags)
    assert export.main([*flags, "--pattern=attn"]) == 0
    found = stored_parameters.read(f"{tmp_path}/run")
    assert found.step == 0
    expected = state["backbone.layers.0.mixer.Wqkv.weight"][4:8].T
    np.testing.assert_array_equal(found.arrays["decoder/segment_0/block_0/mixer/key/kernel"][0], expected)
    assert sum(array.size for array in found.arrays.values()) == sum(array.size for array in state.values())


def test_models_come_out_of_an_object_store_and_go_back(run, store, tmp_path):
    import safetensors.numpy

    folder, saved = run
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(f"bucket/run/{path.relative_to(folder)}", path.read_bytes())
    export.main(["--model_dir=gs://bucket/run", f"--output_dir={tmp_path}/out"])
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(stored[name], array) for name, array in saved[8].items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["network"]["decoder.Decoder.embed_dim"] == "4"

    export.main([f"--input_dir={tmp_path}/out", "--output_dir=gs://bucket/back"])
    average.main(["--checkpoints=gs://bucket/back,gs://bucket/run/checkpoint_3", "--output_dir=gs://bucket/mean"])
    arrays, _ = restored("gs://bucket/mean")
    for name in SHAPES:
        np.testing.assert_allclose(arrays[name], (saved[8][name] + saved[3][name]) / 2, rtol=1e-6)
    assert store.objects["bucket/mean/config.gin"] == (folder / "config.gin").read_bytes()
    with pytest.raises(UserError, match="--output_dir = 'gs://bucket/out': give a folder of a file system"):
        export.main(["--model_dir=gs://bucket/run", "--output_dir=gs://bucket/out"])
