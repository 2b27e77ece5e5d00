"""Perplexity per word of the published count, for a model whose perplexity per token is known: one that guesses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_caches import VOCABULARY, write_mixture

from t5x_ssm import eval as evaluation
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder
from t5x_ssm.training import checkpoints

CONFIG = """
include 'quickstart.gin'
MODEL_DIR = '{folder}'
MIXTURE_OR_TASK_NAME = 'wikitext103'
TASK_FEATURE_LENGTHS = {{'targets': 8}}
BATCH_SIZE = 4
decoder.Decoder.embed_dim = 8
decoder.Decoder.num_layers = 1
gss.GSS.state_size = 4
"""
# Ends of lines are words of WikiText-103, spaces are not: " = A = \n" has four, "b c d\n" four and "e\n" two.
ARTICLES, WORDS = [b" = A = \nb c d\n", b"e\n"], 10


@pytest.mark.slow
def test_perplexity_per_word_of_a_model_that_guesses(tmp_path, monkeypatch, capsys):
    documents = [[*(3 + byte for byte in text), 1] for text in ARTICLES]
    path = write_mixture(tmp_path, "wikitext103", {"wikitext103": {"validation": documents}})
    manifest = path.parent.parent / "wikitext103/made/validation/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"words": WORDS}))
    monkeypatch.setenv("T5X_SSM_CACHE_DIR", str(tmp_path))
    network = Decoder(vocab_size=259, embed_dim=8, num_layers=1, mixers={"gss": lambda **kw: GSS(state_size=4, **kw)})
    tokens = np.zeros((1, 4), np.int32)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), tokens, tokens, enable_dropout=False))["params"]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.gin").write_text(CONFIG.format(folder=folder))
    # An embedding of zeros, tied, makes all logits zero: every token costs log 259.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    tree = {"target": zeros, "state": {"step": jnp.asarray(3), "param_states": {}}}
    with checkpoints.Checkpointer(folder) as checkpointer:
        checkpointer.save(3, tree, {}, {"vocabulary": VOCABULARY})
    assert evaluation.main([f"--model_dir={folder}"]) == 0
    found = json.loads((folder / "evaluation/eval_results.json").read_text())["lengths"]["8"]["wikitext103"]
    tokens = 14 + 1 + 2 + 1
    assert (found["tokens"], found["words"]) == (tokens, WORDS)
    np.testing.assert_allclose(found["word_perplexity"], 259 ** (tokens / WORDS), rtol=1e-5)
    assert f"{found['word_perplexity']:.3f} perplexity per word" in capsys.readouterr().out
