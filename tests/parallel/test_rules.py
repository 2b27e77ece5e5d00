"""From logical axes to placements on a mesh."""

import jax
import numpy as np
import pytest
from flax.linen import partitioning
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from t5x_ssm.errors import UserError
from t5x_ssm.parallel.rules import LOGICAL_AXIS_RULES, mesh_axes, parameter_shardings, usable

MESH = AbstractMesh((2, 2, 1, 4), ("data", "fsdp", "sequence", "model"))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("embed", "mlp"), P("fsdp", "model")),
        (("mlp", "embed"), P("model", "fsdp")),
        (("vocab", "embed"), P("model", "fsdp")),
        (("layers", "channels", "modes"), P(None, "model", "fsdp")),
        (("batch", "length", "embed"), P(("data", "fsdp"), "sequence", None)),  # the batch took fsdp
        (("batch", None, "heads", None), P(("data", "fsdp"), None, "model", None)),
        (("mlp", "heads"), P("model", None)),  # the earlier rule wins
        (("heads", "mlp"), P(None, "model")),
        (("embed", "embed"), P("fsdp", None)),
        ((), P()),
    ],
)
def test_axes_by_priority(axes, spec):
    assert mesh_axes(axes) == spec


def test_unknown_names_are_an_error():
    with pytest.raises(
        UserError, match="Unknown logical axis 'chanels'; the rule table knows abspos_buckets, batch, channels"
    ):
        mesh_axes(("embed", "chanels"))


@pytest.mark.parametrize(
    ("spec", "shape", "kept"),
    [
        (P("fsdp", "model"), (6, 8), P("fsdp", "model")),
        (P("fsdp", "model"), (5, 6), P(None, None)),  # neither divides
        (
            P(
                ("data", "fsdp"),
            ),
            (8, 3),
            P(("data", "fsdp"), None),
        ),
        (
            P(
                ("data", "fsdp"),
            ),
            (6,),
            P("data"),
        ),  # six rows over two, not over four
        (
            P(
                "sequence",
            ),
            (8,),
            P(None),
        ),  # an axis of one device
        (
            P(
                "expert",
            ),
            (8,),
            P(None),
        ),  # an axis this mesh does not have
        (
            P(
                "model",
            ),
            (0,),
            P("model"),
        ),
    ],
)
def test_only_axes_that_exist_and_divide_are_used(spec, shape, kept):
    assert usable(spec, shape, MESH) == kept


def test_every_rule_names_axes_of_the_mesh():
    targets = [target for _, target in LOGICAL_AXIS_RULES if target is not None]
    flat = {axis for target in targets for axis in ((target,) if isinstance(target, str) else target)}
    assert flat == {"data", "fsdp", "sequence", "model"}


def test_parameters_lie_where_their_modules_say():
    mesh = jax.make_mesh((1, 1, 1, 1), MESH.axis_names, devices=jax.devices()[:1])
    params = {"a": {"kernel": np.zeros((4, 8))}, "b": np.zeros(3)}
    axes = {
        "a": {"kernel_axes": partitioning.AxisMetadata(("embed", "mlp"))},
        "b_axes": partitioning.AxisMetadata(("channels",)),
    }
    shardings = parameter_shardings(params, axes, mesh)
    assert jax.tree.map(lambda s: s.spec, shardings) == {"a": {"kernel": P(None, None)}, "b": P(None)}
    axes["b_axes"] = partitioning.AxisMetadata(("channels", "modes"))
    with pytest.raises(UserError, match="must be as many"):
        parameter_shardings(params, axes, mesh)
