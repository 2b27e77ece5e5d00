"""Encoder-decoder batches over a token stream: what is hidden is in the targets, and a row is a function of the seed."""

import collections
import dataclasses
import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from t5x_ssm.data import encoder_decoder, feed
from t5x_ssm.layers.attention import Attention
from t5x_ssm.layers.basic import MLP
from t5x_ssm.models.encoder_decoder import EncoderDecoder
from t5x_ssm.models.objectives import SequenceToSequence
from t5x_ssm.parallel.mesh import MeshConfig, make_mesh
from t5x_ssm.train import batch_shapes
from t5x_ssm.training import optimizers, trainer

VOCABULARY = {"name": "V", "size": 200, "extra_ids": 100, "pad_id": 0, "eos_id": 1, "hash": "v"}


@pytest.fixture
def config(make_cache, counting_documents, tmp_path):
    tasks = {
        "one": {"train": counting_documents(900), "validation": counting_documents(200)},
        "two": {"train": counting_documents(400), "validation": counting_documents(100)},
    }
    for splits in tasks.values():
        for documents in splits.values():
            documents[:] = [[3 + token % 200 for token in document] for document in documents]
    make_cache(tasks, rates=[2.0, 1.0])
    lengths = {"inputs": 24, "targets": 12}
    return feed.DatasetConfig(
        "mixture", lengths, "train", 4, pack=False, cache_dir=tmp_path, objective="span_corruption"
    )


def restored(example, objective):
    """The window that an example was made of, by its sentinels."""
    first = objective.vocabulary["size"] - objective.window
    spans, current = collections.defaultdict(list), None
    targets = example["decoder_target_tokens"][example["decoder_loss_weights"] == 1].tolist()
    assert targets[-1] == 1
    for token in targets[:-1]:
        current = token if token >= first else current
        if token < first:
            spans[current].append(token)
    inputs = [token for token in example["encoder_input_tokens"].tolist() if token]
    assert inputs[-1] == 1
    return [t for token in inputs[:-1] for t in (spans[token] if token >= first else [token])], spans


@hypothesis.given(
    inputs=st.integers(6, 90), density=st.floats(0.05, 0.6), mean=st.floats(1.0, 6.0), seed=st.integers(0, 2**40)
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_what_is_hidden_is_in_the_targets(inputs, density, mean, seed):
    lengths = {"inputs": inputs, "targets": 200}
    vocabulary = {**VOCABULARY, "size": 20_000, "extra_ids": 0}
    objective = encoder_decoder.make_objective(
        "span_corruption", lengths, vocabulary, noise_density=density, mean_span_length=mean
    )
    tokens = np.random.default_rng(seed).integers(2, 19_000, objective.window)
    example = objective.example(tokens, encoder_decoder.generator(seed, 3))
    found, spans = restored(example, objective)
    assert found == tokens.tolist()
    hidden = sum(map(len, spans.values()))
    assert abs(hidden - density * objective.window) <= 1 and all(spans.values())
    assert abs(len(spans) - hidden / mean) <= 0.5 or len(spans) in (1, objective.window - hidden)
    # The longest window that fits.
    assert np.count_nonzero(example["encoder_input_tokens"]) in (inputs, inputs - 1)
    np.testing.assert_array_equal(
        example["decoder_input_tokens"][1:][example["decoder_loss_weights"][1:] == 1],
        example["decoder_target_tokens"][:-1][example["decoder_loss_weights"][1:] == 1],
    )


def test_published_lengths():
    """Raffel et al.: inputs of 512 tokens come from 568, with 114 targets."""
    objective = encoder_decoder.make_objective("span_corruption", {"inputs": 512, "targets": 114}, VOCABULARY)
    assert objective.window == 568
    with pytest.raises(ValueError, match="has 114 targets"):
        encoder_decoder.make_objective("span_corruption", {"inputs": 512, "targets": 113}, VOCABULARY)
    with pytest.raises(ValueError, match="100 extra ids, fewer than"):
        encoder_decoder.make_objective("span_corruption", {"inputs": 4096, "targets": 4096}, VOCABULARY)


@pytest.mark.parametrize("objective", ["span_corruption", "prefix_lm"])
def test_rows_do_not_depend_on_processes_and_a_run_resumes(config, objective):
    config = dataclasses.replace(config, objective=objective)
    with feed.open_feed(config, seed=5) as alone:
        batches = [alone.next() for _ in range(3)]
        state = alone.state()
        following = alone.next()
    assert {name: rows.shape for name, rows in following.items()} == {
        name: shape.shape for name, shape in batch_shapes(config).items()
    }
    parts = [feed.open_feed(config, seed=5, process_index=i, process_count=2) for i in range(2)]
    for part in parts:
        part.restore(state)
    halves = [part.next() for part in parts]
    for part in parts:
        part.close()
    for name, rows in following.items():
        np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), rows)
    assert not np.array_equal(batches[0]["encoder_input_tokens"], following["encoder_input_tokens"])
    with (
        feed.open_feed(dataclasses.replace(config, mean_span_length=2.0), seed=5) as other,
        pytest.raises(ValueError, match="mean_span_length: saved"),
    ):
        other.restore(state)


def test_prefix_lm_reads_on_where_the_inputs_end(config):
    config = dataclasses.replace(config, objective="prefix_lm", shuffle=False, batch_size=1)
    with feed.open_feed(config) as opened:
        batch = opened.next()
    expected = [3 + (3 + i) % 200 for i in range(36)]
    assert batch["encoder_input_tokens"][0].tolist() == expected[:24]
    assert batch["decoder_target_tokens"][0].tolist() == expected[24:]
    assert batch["decoder_input_tokens"][0].tolist() == [0, *expected[24:-1]]


def test_evaluation_is_the_same_every_time_and_whole(config):
    config = dataclasses.replace(config, split="validation", shuffle=False)
    (one, two) = feed.open_evaluation(config).values()
    batches = [list(one), list(one)]
    for first, again in zip(*batches, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], again[name])
    weights = np.concatenate([batch["decoder_loss_weights"].sum(1) for batch in batches[0]])
    window = encoder_decoder.make_objective("span_corruption", config.task_feature_lengths, one.vocabulary).window
    assert np.count_nonzero(weights) == 200 // window and len(weights) == 4 * len(one)
    assert two.task == "two"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pack": True}, "set DatasetConfig.pack=False"),
        ({"task_feature_lengths": {"targets": 8}}, "must have lengths for 'inputs' and 'targets'"),
        ({"source": "seqio"}, "needs DatasetConfig.source='cache'"),
        ({"objective": "sequence_to_sequence"}, "does not hold pairs of 'inputs' and 'targets'"),
        ({"objective": "denoising"}, "must be one of language_model, span_corruption"),
        ({"noise_density": 1.5}, "noise_density must lie between 0 and 1"),
        ({"task_feature_lengths": {"inputs": 24, "targets": 2}}, r"\['targets'\] = 2 is too short"),
    ],
)
def test_settings_that_cannot_be_are_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        feed.open_feed(dataclasses.replace(config, **change))


@pytest.mark.slow
def test_an_encoder_decoder_learns_from_the_feed(config):
    network = EncoderDecoder(
        320,
        16,
        "attn",
        encoder_layers=1,
        decoder_layers=1,
        mlp=functools.partial(MLP, hidden=32),
        encoder_mixers={"attn": functools.partial(Attention, causal=False)},
    )
    with feed.open_feed(config) as opened:
        feed.check_vocabulary(opened.vocabulary, embedding_size=network.vocab_size)
        with pytest.raises(ValueError, match="more ids than the model's vocabulary size 259"):
            feed.check_vocabulary(opened.vocabulary, embedding_size=259)
        mesh = make_mesh(MeshConfig())
        run = trainer.Trainer(SequenceToSequence(network), optimizers.adamw(1e-2), mesh, batch_shapes(config))
        state, losses = run.initial_state(), []
        with jax.set_mesh(mesh):
            for _ in range(30):
                state, metrics = run.train_step(state, run.to_device(opened.next()))
                losses.append(float(metrics["nats"]) / float(metrics["weights"]))
    assert losses[-1] < losses[0] - 1.0
