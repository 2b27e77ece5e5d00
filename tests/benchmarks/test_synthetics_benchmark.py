"""The table of synthetic languages: its training learns what a network must be able to learn, and its page says how."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import synthetics


@pytest.mark.slow
def test_training_learns_an_answer_that_never_changes(monkeypatch):
    """Random symbols that end in symbol 7: the answer's accuracy must reach 100 %, and all other tokens stay a guess."""
    random = np.random.default_rng(0)

    def corpora(name, split, seeds):
        texts = random.integers(1, 9, (len(seeds), 128, 12))
        texts[..., -1] = 7
        return jnp.asarray(texts)

    monkeypatch.setattr(synthetics, "corpora", corpora)
    epochs = 12
    found = synthetics.train("attention", "associative_recall", [0, 1], epochs, rate=0.02, start_as="own")
    assert found["epochs"] == epochs and len(found["curve"]) == epochs
    assert found["accuracy"] == {"associative_recall": [100.0, 100.0], "associative_recall_40": [100.0, 100.0]}
    # 11 of 12 symbols are drawn from 8, which no network can predict better than by guessing among them.
    first, last = found["curve"][0][1], found["curve"][-1][1]
    assert 11 / 12 * np.log(8) - 0.1 < last < first


RUN = {"curve": [], "seconds": 60.0, "compile_seconds": 1.0, "parameters": 10}
RESULTS = {
    "seeds": [0, 1],
    "machine": {"cores": 2, "processor": "some processor", "jax": "0"},
    "systems": {
        "h3": {
            "associative_recall": {
                **RUN,
                "command": "the long command",
                "epochs": 200,
                "accuracy": {"associative_recall": [90.0, 100.0], "associative_recall_40": [50.0, 60.0]},
            },
        },
        "attention": {
            "associative_recall": {
                **RUN,
                "command": "the long command",
                "epochs": 200,
                "accuracy": {"associative_recall": [90.0, 90.0], "associative_recall_40": [50.0, 60.0]},
            },
        },
        "dss": {
            "associative_recall": {
                **RUN,
                "command": "the short command",
                "epochs": 10,
                "accuracy": {"associative_recall": [25.0, 26.0], "associative_recall_40": [25.0, 25.0]},
            }
        },
    },
}


def test_the_page_says_what_was_reached_and_after_how_many_epochs():
    page = synthetics.table(RESULTS)
    assert "| h3 | – | 100.0 | 95.0 (90.0–100.0) | 99.8 | 55.0 (50.0–60.0) | 98.4 |" in page
    assert "| dss | – | – | 25.5 (25.0–26.0) | – | 25.0 (25.0–25.0) | – |" in page
    assert "induction_head: not trained yet" in page
    of_dss, of_h3 = (line for line in page.splitlines() if line.startswith("- associative_recall"))
    assert of_dss == (
        "- associative_recall, dss: 10 epochs of the paper's 200, the schedule shortened with them. `the short command`"
    )
    assert of_h3 == "- associative_recall, h3, attention: 200 epochs, as many as in the paper. `the long command`"
    assert "180 seconds of training" in page
