"""The recipes of the systems, leaf by leaf, and what a group refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5x_ssm.errors import UserError
from t5x_ssm.training import optimizers
from t5x_ssm.training import parameter_groups as groups
from t5x_ssm.training.parameter_groups import ParameterGroup, parameter_path

RATE, DECAY = 4e-3, 0.5
# What a leaf may get: (learning rate, weight decay).
NETWORK, UNDECAYED, SLOW, SLOW_DECAYED = (RATE, DECAY), (RATE, 0.0), (1e-3, 0.0), (1e-3, DECAY)
FROZEN = (0.0, 0.0)
BLOCK = "decoder/segment_0/block_0"
# A network around the state space, with names that lie in wait for careless patterns.
REST = {
    "token_embedder/embedding": NETWORK,
    f"{BLOCK}/mixer_norm/scale": UNDECAYED,
    f"{BLOCK}/mixer_norm/bias": UNDECAYED,
    f"{BLOCK}/mixer/ssm/norm/scale": UNDECAYED,
    f"{BLOCK}/mixer/out/kernel": NETWORK,
    f"{BLOCK}/mixer/out/bias": UNDECAYED,
    f"{BLOCK}/mixer/lossm/b_re": NETWORK,
    "final_norm/scale": UNDECAYED,
}


def leaves(module="ssm", **rates):
    """Rates by path; `b_re_im` stands for the two leaves b_re and b_im."""
    found = {}
    for name, rate in rates.items():
        stem, both, _ = name.partition("_re_im")
        found |= {
            f"{BLOCK}/mixer/{module}/{leaf}": rate for leaf in ((f"{stem}_re", f"{stem}_im") if both else (name,))
        }
    return found


def s5(poles, step, b, c, d):
    return leaves(lambda_re_im=poles, log_step=step, b_re_im=b, c_re_im=c, c_backward_re_im=c, d=d)


S4 = {"a_log_re": SLOW, "a_im": SLOW, "p_re_im": SLOW, "b_re_im": SLOW, "c_re_im": NETWORK, "d": NETWORK}
H3 = leaves(a_log_re=SLOW, a_im=SLOW, b_re_im=SLOW, log_step=SLOW, c_re_im=NETWORK, d=NETWORK)
GSS = leaves(lambda_log_re=SLOW, lambda_log_im=SLOW, c_re_im=NETWORK, d=NETWORK)
# System -> (groups, rates of all its leaves, sizes of the groups in leaves).
RECIPES = {
    "gss": (groups.gss_groups(), GSS, {"state_space": 2, "state_space_decayed": 3}),
    "h3": (
        groups.h3_groups(),
        H3 | leaves("shift_ssm", b=SLOW, c=NETWORK, d=NETWORK),
        {"state_space": 6, "state_space_decayed": 5},
    ),
    "s4": (groups.s4_groups(), leaves(**S4, log_step=SLOW), {"state_space": 7, "state_space_decayed": 3}),
    "s4, SPADE": (
        groups.s4_groups(step_at_network_rate=True),
        leaves(**S4, log_step=UNDECAYED),
        {"state_space": 6, "state_space_step": 1, "state_space_decayed": 3},
    ),
    "s4, frozen": (
        groups.frozen_state_space_groups(),
        leaves(**dict.fromkeys(S4, FROZEN), log_step=FROZEN) | {f"{BLOCK}/mixer/ssm/norm/scale": FROZEN},
        {"frozen": 11, "no_decay": 4, "state_space_decayed": 0},
    ),
    "dss": (
        groups.dss_groups(),
        leaves(lambda_log_re=SLOW, lambda_im=SLOW, log_step=SLOW, c_re_im=SLOW, d=NETWORK),
        {"state_space": 5, "state_space_decayed": 1},
    ),
    "s5, standard": (
        groups.s5_groups("standard"),
        s5(SLOW, SLOW, SLOW, NETWORK, NETWORK),
        {"state_space": 5, "state_space_decayed": 5},
    ),
    "s5, dt_global": (
        groups.s5_groups("standard", dt_global=True),
        s5(SLOW, NETWORK, SLOW, NETWORK, NETWORK),
        {"state_space": 4, "state_space_decayed": 6},
    ),
    "s5, BandCdecay": (
        groups.s5_groups("BandCdecay"),
        s5(SLOW, SLOW, SLOW_DECAYED, NETWORK, NETWORK),
        {"state_space": 3, "state_space_input": 2, "state_space_decayed": 5},
    ),
    "s5, BfastandCdecay": (
        groups.s5_groups("BfastandCdecay"),
        s5(SLOW, SLOW, NETWORK, NETWORK, NETWORK),
        {"state_space": 3, "state_space_decayed": 7},
    ),
    "s5, noBCdecay": (
        groups.s5_groups("noBCdecay"),
        s5(SLOW, SLOW, SLOW, SLOW, SLOW),
        {"state_space": 10, "state_space_decayed": 0},
    ),
}


def tree(paths, seed):
    """Values [3] at every path."""
    random = np.random.default_rng(seed)
    nested = {}
    for path in sorted(paths):
        *parents, leaf = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(random.normal(size=3), jnp.float32)
    return nested


def by_path(tree):
    return {parameter_path(path): np.asarray(x, np.float64) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("system", RECIPES)
def test_every_leaf_moves_as_the_recipe_of_its_system_says(system):
    """Two updates, against AdamW in float64 with each leaf's own rate and decay."""
    recipe, own, sizes = RECIPES[system]
    rates = REST | own
    b1, b2, eps = 0.9, 0.95, 1e-8
    optimizer = optimizers.adamw(RATE, b1=b1, b2=b2, eps=eps, weight_decay=DECAY, groups=recipe, clip_global_norm=None)
    params = tree(rates, seed=0)
    state = optimizer.init(params)
    expected, mu, nu = by_path(params), dict.fromkeys(rates, 0.0), dict.fromkeys(rates, 0.0)
    for n in (1, 2):
        grads = tree(rates, seed=n)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for path, g in by_path(grads).items():
            rate, decay = rates[path]
            mu[path] = b1 * mu[path] + (1 - b1) * g
            nu[path] = b2 * nu[path] + (1 - b2) * g**2
            direction = mu[path] / (1 - b1**n) / (np.sqrt(nu[path] / (1 - b2**n)) + eps)
            expected[path] = expected[path] - rate * (direction + decay * expected[path])
    for path, x in by_path(params).items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-6, atol=1e-7, err_msg=path)

    table = {row["group"]: row for row in optimizer.group_rows(params)}
    defaults = {"no_decay": 5, "decay": 3}
    assert {name: row["leaves"] for name, row in table.items()} == defaults | sizes
    printed = optimizer.group_table(params)
    assert all(f"{name} " in printed for name in table) and printed.split()[-2] == str(len(rates))


def test_adafactor_leaves_every_state_space_leaf_whole():
    for recipe, own, _ in RECIPES.values():
        labels = by_group(recipe, tree(REST | own, seed=0))
        settings = {group.name: group for group in recipe}
        for path in own:
            group = settings[labels[path]]
            assert group.frozen or "norm" in path or not (group.factored or group.parameter_scaled), path


def by_group(recipe, params):
    labels = jax.tree_util.tree_leaves_with_path(groups.group_labels(params, recipe))
    return {parameter_path(path): label for path, label in labels}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"option": "BandCDecay"}, "BandCDecay.*standard, BandCdecay, BfastandCdecay, noBCdecay"),
        ({"learning_rate_factor": 0.0}, "learning_rate_factor"),
    ],
)
def test_s5_options_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        groups.s5_groups(**settings)


def test_freezing_what_is_not_there_is_refused():
    recipe = groups.frozen_state_space_groups()
    with pytest.raises(UserError, match="'frozen' has no parameter"):
        groups.group_labels(tree(["mlp/wi/kernel"], seed=0), recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "("}, "regex"),
        ({"learning_rate": 0.1, "learning_rate_scale": 0.5}, "Choose one"),
        ({"learning_rate": 0.1, "max_learning_rate": 0.5}, "Choose one"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"learning_rate_scale": float("nan")}, "learning_rate_scale"),
    ],
)
def test_group_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ParameterGroup("group", **({"pattern": ""} | settings))
