"""Sizes of the mesh axes and their mistakes."""

import pytest

from t5x_ssm.errors import UserError
from t5x_ssm.parallel.mesh import AXES, MeshConfig, batch_shards, make_mesh


def test_one_axis_takes_the_remaining_devices():
    assert MeshConfig(data=2, fsdp=-1, model=4).sizes(16) == {"data": 2, "fsdp": 2, "sequence": 1, "model": 4}
    assert MeshConfig().sizes(8) == {"data": 8, "fsdp": 1, "sequence": 1, "model": 1}
    assert tuple(MeshConfig().sizes(1)) == AXES


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(data=-1, model=-1), 8, "only one axis may be -1, but data and model are"),
        (MeshConfig(model=3), 8, "fixed axes take 3 devices, which does not divide the 8 present, so data"),
        (MeshConfig(data=2, model=2), 8, "data 2 x fsdp 1 x sequence 1 x model 2 = 4 devices, but 8 are present"),
        (MeshConfig(fsdp=0), 8, "MeshConfig.fsdp = 0"),
        (MeshConfig(sequence=-2), 8, "MeshConfig.sequence = -2"),
    ],
)
def test_mistakes_name_the_axis(config, devices, message):
    with pytest.raises(UserError, match=message):
        config.sizes(devices)


def test_a_mesh_of_what_is_here():
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    assert mesh.axis_names == AXES
    assert batch_shards(mesh) == mesh.devices.size
