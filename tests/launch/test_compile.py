"""Plans of a small model by the TPU compiler, what is printed when a program does not fit, and mistakes of users."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from training_command import ROOT

from launch import chips, roofline
from launch import compile as compile_lib
from launch.costs import Collective, Costs
from t5x_ssm import config as config_lib
from t5x_ssm.errors import UserError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which pip install 't5x_ssm[aot]' brings"
)
# 2 GSS layers of width 128 for 8 chips: 4 batch shards of 2-way split channels.
TINY = (
    "include 'networks/gss_192m.gin'\ninclude 'runs/pretrain_pod.gin'\n"
    "from __gin__ import dynamic_registration\nfrom t5x_ssm.layers import gss\nfrom t5x_ssm.models import decoder\n"
    "from t5x_ssm.parallel import mesh\n"
    "VOCAB_SIZE = 256\nNUM_LAYERS = 2\nREMAT_POLICY = 'full'\nBATCH_SIZE = 8\nTASK_FEATURE_LENGTHS = {'targets': 64}\n"
    "decoder.Decoder.embed_dim = 128\ngss.GSS.hidden = 512\ngss.GSS.channels = 256\ngss.GSS.state_size = 8\n"
    "mesh.MeshConfig.model = 2\n"
)


def compile_plan(tmp_path, *flags):
    gin_file = tmp_path / "tiny.gin"
    gin_file.write_text(TINY)
    command = [sys.executable, "-m", "launch.compile", f"--gin_file={gin_file}", f"--output_dir={tmp_path}", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_libtpu
@pytest.mark.slow
def test_a_small_model_is_planned_and_the_plan_is_kept(tmp_path):
    done = compile_plan(tmp_path, "--topology=v5e:2x4")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("tiny_v5e_2x4_*.json")
    plan = json.loads(path.read_text())

    # Embedding, final norm, and 2 layers: norms, gate, reduce, state space (2 poles and C by 8 modes, D), expand, out.
    layer = 2 * 128 + 128 * 512 + 128 * 256 + 2 * 256 + (2 * 8 + 2 * 256 * 8 + 256) + 256 * 512 + 512 * 128
    assert plan["parameters"] == 256 * 128 + 2 * 128 + 2 * layer
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "model": 2}
    # float32, and nearly all of it split over 8 devices; two moments are twice the parameters.
    assert plan["parameters"] * 4 / 8 <= plan["bytes"]["parameters"] < plan["parameters"] * 4 / 7
    assert plan["bytes"]["optimizer"] == pytest.approx(2 * plan["bytes"]["parameters"], rel=0.01)
    # 8 x 64 tokens; every projection runs forward, again in the backward pass, and twice as gradients.
    tokens, projections = 8 * 64, 2 * (128 * 512 + 128 * 256 + 256 * 512 + 512 * 128)
    least = tokens * 2 * (4 * projections + 3 * 256 * 128) / 8
    assert least <= plan["flops"]["program"] < 2 * least
    assert plan["flops"]["model"] == 6 * plan["parameters"] * tokens / 8
    assert not plan["unknown_loops"]
    assert {c["axes"] for c in plan["collectives"]} <= {"fsdp", "model", "fsdp+model"}
    assert "predicted, not measured" in done.stdout and "all-" in done.stdout

    # The same question again is answered from the file, unless that is of another program.
    path.write_text(json.dumps({**plan, "parameters": 12345}))
    assert "12,345 parameters" in compile_plan(tmp_path, "--topology=v5e:2x4").stdout
    path.write_text(json.dumps({**plan, "parameters": 12345, "program": "of other code"}))
    assert f"{plan['parameters']:,} parameters" in compile_plan(tmp_path, "--topology=v5e:2x4").stdout
    again = json.loads(path.read_text())
    timing = ("compile_seconds", "compile_cpu_seconds")
    assert {name: again[name] for name in again if name not in timing} == {
        name: plan[name] for name in plan if name not in timing
    }


@needs_libtpu
@pytest.mark.aot
def test_between_slices_go_the_gradients_and_nothing_else(tmp_path):
    for slices in (2, 4):
        flags = (f"--slices={slices}", f"--gin.mesh.MeshConfig.data={slices}", "--gin.BATCH_SIZE=16")
        done = compile_plan(tmp_path, "--topology=v5e:2x4", *flags)
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob(f"tiny_v5e_2x4_x{slices}_*.json")
        plan = json.loads(path.read_text())
        assert plan["devices"] == 8 * slices and not any("data" in c["axes"].split("+") for c in plan["collectives"])
        (between,) = [c for c in plan["collectives"] if c["axes"] == "slices"]
        assert between["kind"] == "all-reduce" and between["group_size"] == slices
        # A gradient for each parameter of a device's eighth, in bfloat16 or float32, and a few numbers.
        assert 2 * plan["parameters"] / 8 <= between["bytes"] <= 1.1 * 4 * plan["parameters"] / 8


@needs_libtpu
@pytest.mark.aot
def test_a_chip_of_many_does_and_sends_what_a_chip_of_few_does(tmp_path):
    plans = []
    for topology, rows in (("v5e:4x4", 16), ("v5e:8x16", 128)):  # 2 rows for each of 8 and of 64 shards
        done = compile_plan(tmp_path, f"--topology={topology}", f"--gin.BATCH_SIZE={rows}")
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob(f"tiny_{topology.replace(':', '_')}_*.json")
        plans.append(json.loads(path.read_text()))
    sent = [sum(c["bytes"] for c in plan["collectives"]) for plan in plans]
    assert plans[1]["flops"]["program"] == pytest.approx(plans[0]["flops"]["program"], rel=0.1)
    assert sent[1] == pytest.approx(sent[0], rel=0.1)


@needs_libtpu
@pytest.mark.aot
def test_search_reports_the_best_of_what_it_compiles(tmp_path):
    (tmp_path / "tiny.gin").write_text(TINY)
    program = "import sys; from launch import compile as c; c.ROWS_PER_SHARD = (1, 2); sys.exit(c.main(sys.argv[1:]))"
    flags = [f"--gin_file={tmp_path}/tiny.gin", f"--output_dir={tmp_path}", "--topology=v5e:2x4", "--search"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    command = [sys.executable, "-c", program, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rates = [int(rate.replace(",", "")) for rate in re.findall(r"free, ([\d,]+) tokens/s if nothing", done.stdout)]
    assert len(rates) == len(list(tmp_path.glob("*.json"))) == 2 * len(compile_lib.POLICIES)
    best = re.search(r"in turn: .* ([\d,]+) tokens/s", done.stdout)[1]
    assert int(best.replace(",", "")) == max(rates)


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_largest_arrays(tmp_path):
    done = compile_plan(tmp_path, "--topology=v5e:2x4", "--gin.BATCH_SIZE=8192", "--gin.VOCAB_SIZE=262144")
    assert done.returncode == 2
    assert "The step does not fit" in done.stderr and "REMAT_POLICY" in done.stderr
    # Logits of all tokens: 8192 x 64 x 262144 float32, an eighth of them on a chip of 16 GiB.
    assert re.search(r"512\.00 GiB  float32\[8192,64,262144\]", done.stderr), done.stderr
    assert not list(tmp_path.glob("*.json"))


@needs_libtpu
@pytest.mark.aot
def test_seven_billion_parameters_fit_a_v5p_slice(tmp_path):
    command = [sys.executable, "-m", "launch.compile", "--gin_file=models/gss_7b.gin", "--topology=v5p:4x4x8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run([*command, f"--output_dir={tmp_path}"], cwd=ROOT, env=environment)
    assert done.returncode == 0
    (path,) = tmp_path.glob("*.json")
    plan = json.loads(path.read_text())
    assert plan["hbm_free"] >= 0.1 and plan["batch"] * plan["length"] >= 2**21
    tokens = plan["batch"] * plan["length"]
    # Rematerialized in full, a step computes 8 FLOPs a parameter and token; the state space comes on top.
    assert 0.95 * 8 * plan["parameters"] * tokens / 128 <= plan["flops"]["program"]
    # Nothing gathers activations: no collective but the embedding's carries more than a layer's largest parameter.
    assert all(c["largest"] <= 32000 * 4096 * 4 for c in plan["collectives"])


@needs_libtpu
@pytest.mark.aot
def test_a_million_tokens_of_context_fit_a_v5p_cube(tmp_path):
    command = [
        sys.executable,
        "-m",
        "launch.compile",
        "--gin_file=models/gss_hybrid_1_3b_1m.gin",
        "--topology=v5p:4x4x4",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run([*command, f"--output_dir={tmp_path}"], cwd=ROOT, env=environment)
    assert done.returncode == 0
    (path,) = tmp_path.glob("*.json")
    plan = json.loads(path.read_text())
    assert plan["length"] == 2**20 and plan["mesh"]["sequence"] == 32 and plan["hbm_free"] >= 0.1
    # States and halos of 512 tokens go from piece to piece, and gradients are summed; nothing gathers the text, of which a
    # piece of one layer's activations alone is 128 MiB.
    over = {c["kind"]: c for c in plan["collectives"] if "sequence" in c["axes"]}
    assert set(over) == {"all-reduce", "collective-permute"}
    assert over["collective-permute"]["largest"] <= 2 * 512 * 2048 * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("v9:2x2", "CHIP:SHAPE"), ("v5p", "CHIP:SHAPE"), ("v5p:2x4", "3 dimensions"), ("v5e:2x2x2", "2 dimensions")],
)
def test_topologies_that_cannot_be_read(name, message):
    with pytest.raises(UserError, match=message):
        chips.parse_topology(name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "--gin_file"), (["--gin_file=models/gss_7b.gin", "--slices=0"], "--slices=0")],
)
def test_mistakes_on_the_command_line(flags, message):
    with pytest.raises(UserError, match=message):
        compile_lib.main(["--topology=v5e:2x4", *flags])


def test_the_table_of_chips_agrees_with_pods_as_published():
    # Peaks of whole pods, from the same pages: 1.1 exaFLOP of 4,096 v4, 234.9 petaFLOP of 256 v6e, 50.63 of 256 v5e.
    assert chips.CHIPS["v4"].flops * 4096 == pytest.approx(1.1e18, rel=0.03)
    assert chips.CHIPS["v6e"].flops * 256 == pytest.approx(234.9e15, rel=0.001)
    assert chips.CHIPS["v5e"].flops * 256 == pytest.approx(50.63e15, rel=0.005)
    # All-reduce bandwidth of a pod: 51.2 and 102.4 TB/s, that is each chip's one-directional bandwidth.
    assert chips.CHIPS["v5e"].ici_bandwidth * 256 == pytest.approx(51.2e12)
    assert chips.CHIPS["v6e"].ici_bandwidth * 256 == pytest.approx(102.4e12)
    # Between slices: hosts of 8 v6e have four ports of 200 Gbit/s, and those of 8 v5e two of 100.
    assert chips.CHIPS["v6e"].network_bandwidth * 8 == pytest.approx(4 * 200e9 / 8)
    assert chips.CHIPS["v5e"].network_bandwidth * 8 == pytest.approx(2 * 100e9 / 8)


def test_the_roofline_of_known_costs():
    chip = chips.Chip(
        flops=1e12, hbm_bytes=1, hbm_bandwidth=1e9, ici_bandwidth=1e8, network_bandwidth=1e7, dimensions=2
    )
    collectives = (
        Collective("all-reduce", "fsdp", 1, bytes=4 * 10**8, largest=1, group_size=4),  # 2 x 3/4 of 4 s
        Collective("all-gather", "model", 1, bytes=10**8, largest=1, group_size=2),  # 1/2 of 1 s
        Collective("all-reduce", "slices", 1, bytes=2 * 10**7, largest=1, group_size=2),  # 2 x 1/2 of 2 s
    )
    seconds = roofline.step_seconds(Costs(1e12, 3e12, 5e9, collectives, ()), chip)
    assert seconds == pytest.approx(
        {"compute": 3.0, "hbm": 5.0, "interconnect": 6.5, "network": 2.0, "overlapped": 6.5, "in_turn": 16.5}
    )
    with pytest.raises(UserError, match="--slices"):
        roofline.step_seconds(Costs(1e12, 3e12, 5e9, collectives, ()), chips.CHIPS["v4"])


def planned(name):
    """The network of a file of gin/models, shapes of its parameters, and shapes of its batch."""
    from t5x_ssm.train import batch_shapes

    run = compile_lib.load(config_lib.Arguments((f"models/{name}.gin",), (), (), None))
    shapes = batch_shapes(run["train_dataset_cfg"])
    return run["model"].network, jax.eval_shape(lambda: run["model"].init(jax.random.key(0), shapes))["params"], shapes


def test_model_flops_count_the_keys_that_queries_see():
    params = {"kernel": jax.ShapeDtypeStruct((10, 100), jnp.float32)}
    network, _, _ = planned("gss_hybrid_7b")
    # 10 of 40 layers attend, in chunks of 512, with 32 heads of 128.
    seen = sum(min(i % 512, 511) + 1 for i in range(4096)) / 4096
    expected = 4096 * 2 * (6 * 1000 + 12 * 10 * 4096 * seen)
    batch = {"decoder_input_tokens": jax.ShapeDtypeStruct((2, 4096), jnp.int32)}
    assert roofline.model_flops(network, params, batch) == pytest.approx(expected)
    # A sliding window of 512 in every one of 34 layers, the global one included.
    network, _, _ = planned("spade_lm_7b")
    seen = sum(min(i + 1, 512) for i in range(4096)) / 4096
    batch = {"decoder_input_tokens": jax.ShapeDtypeStruct((1, 4096), jnp.int32)}
    assert roofline.model_flops(network, {}, batch) == pytest.approx(4096 * 12 * 34 * 4096 * seen)


def test_model_flops_of_an_encoder_decoder_count_each_side_by_its_tokens():
    found = roofline.model_flops(*planned("spade_3b"))
    width, source, target = 2048, 4096, 1024
    # Multiplications of one token in matrices: an encoder layer has four square ones and a feed-forward block of 4, the first
    # also what joins its two halves; a decoder layer has the four of cross-attention too, two of them over the source.
    encoder_token = 24 * 12 * width**2 + 2 * width**2 + 24 * 2 * width**2
    decoder_token = 24 * 14 * width**2 + 50272 * width
    around = sum(min(i, 128) + 1 + min(source - 1 - i, 128) for i in range(source)) / source
    attention = 24 * width * (source * around + target * (target + 1) / 2 + target * source)
    expected = 512 * (6 * (source * encoder_token + target * decoder_token) + 12 * attention)
    # Norms, biases, S4's own parameters and the learned positions are counted like matrices: under half a percent.
    assert expected < found < 1.005 * expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Table, final norm, and layers: 2 norms and four projections of GSS; D, C and the poles of its state space.
        ("gss_7b", 32000 * 4096 + 8192 + 44 * (8192 + 2048 + 4096 * (2 * 16384 + 1024) + 1024 * (16384 + 1025) + 1024)),
        # Four square projections, an MLP of 4, two norms.
        ("transformer_7b", 32000 * 4096 + 8192 + 34 * (12 * 4096**2 + 4 * 4096)),
        # As their files of gin/networks say.
        ("spade_base", 239_147_520),
        ("spade_large", 759_980_032),
    ],
)
def test_sizes_of_the_large_models(name, parameters):
    _, params, shapes = planned(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    batch, length = shapes.get("encoder_input_tokens", shapes["decoder_input_tokens"]).shape
    assert batch * length >= 2**21 and length >= 4096
