"""Which leaves that the layers themselves create learn slowly and without decay: those that their papers say, and no others."""

import jax
import numpy as np
import pytest
from tiny import shapes

from t5x_ssm.layers.dss import DSS
from t5x_ssm.layers.gated_operator import GatedOperator
from t5x_ssm.layers.gss import GSS
from t5x_ssm.layers.h3 import H3
from t5x_ssm.layers.s4 import S4, S4D
from t5x_ssm.layers.s5 import S5
from t5x_ssm.training import parameter_groups as groups

X = np.zeros((1, 4, 8), np.float32)


def pairs(*names):
    return {f"{name}_{part}" for name in names for part in ("re", "im")}


BOTH_C = pairs("c", "c_backward")
S4_SLOW = {"a_log_re", "a_im", "log_step"} | pairs("b")
S5_POLES = {"log_step"} | pairs("lambda")
# (layer, groups, its slow leaves without decay, the other leaves of its state spaces), under `ssm/` where nothing else is said.
PAPERS = {
    "gss": (GSS(state_size=4), groups.gss_groups(), {"lambda_log_re", "lambda_log_im"}, pairs("c") | {"d"}),
    "dss": (DSS(state_size=4, bidirectional=True), groups.dss_groups(), S5_POLES | BOTH_C, {"d"}),
    "s4": (S4(state_size=4, bidirectional=True), groups.s4_groups(), S4_SLOW | pairs("p"), BOTH_C | {"d"}),
    "s4d": (S4D(state_size=4), groups.s4_groups(), S4_SLOW, pairs("c") | {"d"}),
    "h3": (
        H3(state_size=4),
        groups.h3_groups(),
        S4_SLOW | {"shift_ssm/b"},
        pairs("c") | {"d", "shift_ssm/c", "shift_ssm/d"},
    ),
    "s5": (
        S5(state_size=4, bidirectional=True),
        groups.s5_groups("standard"),
        S5_POLES | pairs("b"),
        BOTH_C | {"d"},
    ),
    "s5, BfastandCdecay": (
        S5(state_size=4, bidirectional=True),
        groups.s5_groups("BfastandCdecay"),
        S5_POLES,
        BOTH_C | pairs("b") | {"d"},
    ),
    "s5, noBCdecay": (
        S5(state_size=4, bidirectional=True),
        groups.s5_groups("noBCdecay"),
        S5_POLES | BOTH_C | pairs("b") | {"d"},
        set(),
    ),
    "gated operator": (
        GatedOperator(),
        groups.s5_groups("standard"),
        S5_POLES | pairs("b"),
        pairs("c") | {"d"},
    ),
}


@pytest.mark.parametrize("system", PAPERS)
def test_leaves_of_a_layer_are_in_the_groups_of_its_paper(system):
    layer, recipe, slow, others = PAPERS[system]
    params = shapes(layer, X, enable_dropout=False)["params"]
    labels = groups.group_labels(params, recipe)
    settings = {group.name: group for group in recipe}
    found = {}
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
        path, group = groups.parameter_path(path), settings[label]
        bounded = group.max_learning_rate == 1e-3 or group.learning_rate_scale == 0.25
        found[path.removeprefix("ssm/")] = (bounded, group.weight_decay)
    state_space = {name: found.pop(name) for name in slow | others}
    assert state_space == {**dict.fromkeys(slow, (True, 0.0)), **dict.fromkeys(others, (False, None))}
    # What is left lies outside of state spaces, learns with the network, and decays if it is a matrix.
    assert not any("ssm" in path or bounded for path, (bounded, _) in found.items())
    assert all((decay is None) == path.endswith("kernel") for path, (_, decay) in found.items())
