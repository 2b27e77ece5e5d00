"""The harness's requests against one forward pass a text, worked out in NumPy."""

import functools
import types

import jax
import numpy as np
import pytest
import scipy.special
import tiny

from t5x_ssm.errors import UserError
from t5x_ssm.inference.decoding import Generator
from t5x_ssm.integrations.lm_eval import Requests, harness_model
from t5x_ssm.layers.gss import GSS
from t5x_ssm.models.decoder import Decoder

EOS = 1
# Few letters, so that greedy text varies and stop strings occur.
LETTERS = "abcde \n"
NETWORK = Decoder(len(LETTERS) + 2, 8, num_layers=2, mixers={"gss": functools.partial(GSS, state_size=4)})


def encode(text):
    return [LETTERS.index(letter) + 2 for letter in text]


def decode(ids):
    return "".join(LETTERS[i - 2] for i in ids)


@functools.cache
def params():
    tokens = np.zeros((1, 4), np.int32)
    params = tiny.random_parameters(NETWORK, tokens, tokens, seed=3, enable_dropout=False)
    params["token_embedder"]["embedding"] = 3.0 * params["token_embedder"]["embedding"]
    return params


@functools.cache
def requests():
    return Requests(Generator(NETWORK, params()), encode, decode, eos_id=EOS, batch_size=3, window=16)


@functools.cache
def forward():
    apply = jax.jit(lambda params, inputs: NETWORK.apply({"params": params}, inputs, inputs, enable_dropout=False))
    return functools.partial(apply, params())


def log_p(ids):
    """float64 [len(ids) + 1, V]: of the token after each prefix. Rows are padded so that they share a program."""
    inputs = np.zeros((1, 64), np.int32)
    inputs[0, 1 : len(ids) + 1] = ids
    return scipy.special.log_softmax(np.asarray(forward()(inputs)[0, : len(ids) + 1], np.float64), axis=-1)


def scored(context, continuation):
    ids, given = encode(context + continuation), len(context.rstrip())
    table = log_p(ids)
    greedy = all(table[i].argmax() == ids[i] for i in range(given, len(ids)))
    return sum(table[i, ids[i]] for i in range(given, len(ids))), greedy


def written(context, limit, stops):
    """Greedy text by one forward pass a token."""
    ids = encode(context)
    for _ in range(limit):
        token = int(log_p(ids)[-1].argmax())
        if token in (0, EOS):
            break
        ids.append(token)
        if any(stop in decode(ids[len(context) :]) for stop in stops):
            break
    text = decode(ids[len(context) :])
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def test_log_likelihoods_are_those_of_a_forward_pass():
    best = decode([int(log_p(encode("ab"))[-1][2:].argmax()) + 2])
    pairs = [("ab", "cde"), ("", "ab\n"), ("ab cd ", "e"), ("a" * 30, "bcd" * 9), ("ab", best)]
    found = requests().loglikelihood(pairs)
    for (score, greedy), pair in zip(found, pairs, strict=True):
        expected, likeliest = scored(*pair)
        np.testing.assert_allclose(score, expected, rtol=1e-4)
        assert greedy == likeliest
    rolling = requests().loglikelihood_rolling(["abcde" * 8, "a"])
    np.testing.assert_allclose(rolling, [scored("", text)[0] for text in ("abcde" * 8, "a")], rtol=1e-4)


@pytest.mark.slow
def test_generations_are_greedy_and_end_before_a_stop_string():
    contexts = ["ab", "", "cd e", "eeee"]
    free = requests().generate_until([(context, {"max_gen_toks": 20}) for context in contexts])
    assert free == [written(context, 20, ()) for context in contexts]
    longest = max(free, key=len)
    assert len(longest) > 3, "nothing to stop"
    stops = [longest[2:4], "\n"]
    found = requests().generate_until([(context, {"until": stops, "max_gen_toks": 20}) for context in contexts])
    assert found == [written(context, 20, stops) for context in contexts]
    assert found != free


def test_draws_belong_to_the_request():
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    mixed = [("ab", settings), ("cde", {"max_gen_toks": 5}), ("e", settings), ("abc", settings), ("dd", settings)]
    found = requests().generate_until(mixed)
    assert found[1] == written("cde", 5, ())
    assert found == requests().generate_until(mixed)
    assert found[0] != requests().generate_until([("ab", {"max_gen_toks": 12})])[0]


def test_unknown_settings_are_refused():
    with pytest.raises(UserError, match="beams"):
        requests().generate_until([("a", {"beams": 4})])


def test_the_harness_itself_scores_a_task_of_its_format(tmp_path):
    """Through the real package, where it is installed: accuracy of choices, perplexity per word and byte, exact matches."""
    lm_eval = pytest.importorskip("lm_eval")
    import json

    from t5x_ssm import harness

    rows = [{"q": "ab ", "a": "cd", "b": "ee"}, {"q": "c", "a": "a", "b": "bde"}, {"q": "d d", "a": "eb", "b": "a"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n  cache_dir: {tmp_path}/cache\n"
        "test_split: test\n"
    )
    (tmp_path / "choices.yaml").write_text(
        f"task: choices_here\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{[a, b]}}'\ndoc_to_target: 0\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    (tmp_path / "rolling.yaml").write_text(
        f"task: rolling_here\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{q}}{{a}}'\nmetric_list:\n  - metric: byte_perplexity\n"
    )
    (tmp_path / "writing.yaml").write_text(
        f"task: writing_here\n{common}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n"
        "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 4\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n"
    )
    names = ["choices_here", "rolling_here", "writing_here"]
    found = harness.evaluate(requests(), names, str(tmp_path), bootstrap_iters=0)["results"]
    right = np.mean([scored(r["q"], r["a"])[0] > scored(r["q"], r["b"])[0] for r in rows])
    assert found["choices_here"]["acc,none"] == pytest.approx(right)
    texts = [r["q"] + r["a"] for r in rows]
    per_byte = np.exp(-sum(scored("", text)[0] for text in texts) / sum(map(len, texts)))
    assert found["rolling_here"]["byte_perplexity,none"] == pytest.approx(per_byte, rel=1e-4)
    same = np.mean([written(r["q"], 4, ["e"]) == r["a"] for r in rows])
    assert found["writing_here"]["exact_match,none"] == pytest.approx(same)
    assert isinstance(harness_model(requests()), lm_eval.api.model.LM)
    with pytest.raises(UserError, match="nowhere"):
        harness.evaluate(requests(), ["nowhere"], str(tmp_path))


def test_the_model_passes_the_arguments_of_its_requests_on():
    pytest.importorskip("lm_eval")
    model = harness_model(requests())
    instance = types.SimpleNamespace(args=("ab", "cde"))
    assert model.loglikelihood([instance]) == requests().loglikelihood([("ab", "cde")])
