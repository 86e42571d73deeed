"""Sharding in Flax: rules and meshes; training on 8 virtual devices and in two processes; the example."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
from click.testing import CliRunner
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from gpt2_multi.errors import InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.parameters.sharding import DATA, FSDP, TENSOR, make_mesh, param_specs, shard_batch, shard_params
from gpt2_multi.model.checkpoint import read_weights
from gpt2_multi.model.config import GPT2Config
from tests.support import fixtures
from tests.support.effort import THOROUGH

ROOT = Path(__file__).resolve().parents[2]
SMALL = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=4, eos_token_id=None, bos_token_id=None)
NAMES = ("data", "fsdp", "tensor", "mixed", "mixed scan")


def environment(devices: int) -> dict[str, str]:
    """With virtual devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def finished(process: subprocess.Popen) -> str:
    """What a process printed, once it has ended well."""
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out


def start(*command: str, devices: int = 8) -> subprocess.Popen:
    """A process of Python."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(devices), **pipes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model of 8 devices, and what training made of it, are."""
    where = tmp_path_factory.mktemp("sharding")
    fixtures.write_model(where / "model", SMALL, "lm", dtype=np.float32)
    return where


@pytest.fixture(scope="module")
def found(folder):
    """What tests/flax/devices.py found on 8 virtual devices."""
    out = finished(start("-m", "tests.flax.devices", str(folder / "model"), str(folder)))
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_gives_the_losses_of_one_device(found, name):
    expected = found[f"one {'scan' in name}"]["losses"]
    print(name, np.abs(np.subtract(found[name]["losses"], expected)).max())
    np.testing.assert_allclose(found[name]["losses"], expected, rtol=0, atol=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_moments_are_really_sharded(found, name):
    whole = found[f"one {'scan' in name}"]["shapes"]
    placed = found[name]["placed"]
    assert placed == found[name]["after"] == found[name]["moments"][0] == found[name]["moments"][1]
    sizes = {"data": (1, 1), "fsdp": (8, 1), "tensor": (1, 4)}.get(name, (2, 2))
    path = "transformer/h/layers" if "scan" in name else "transformer/h/1"
    for leaf, dims in (("attn/c_attn/kernel", (0, 2)), ("attn/c_proj/kernel", (2, 0)), ("mlp/c_proj/kernel", (1, 0))):
        expected = list(whole[f"{path}/{leaf}"])
        for dim, parts in zip(dims, sizes, strict=True):
            expected[dim + ("scan" in name)] //= parts
        assert placed[f"{path}/{leaf}"] == [expected] * 8
    assert placed["transformer/wte/embedding"] == [[32 // sizes[1], 16 // sizes[0]]] * 8


@pytest.mark.parametrize("name", NAMES[1:])
def test_no_sharded_tensor_is_read_as_a_whole(found, name):
    model = FlaxGPT2LMHeadModel(SMALL, scan_layers="scan" in name, _do_init=False)
    whole = {"/".join(path): list(x.shape) for path, x in flatten_dict(model.params_shape_tree).items()}
    parts = [shape for shapes in found[name]["read"].values() for shape in shapes]
    cut = [whole[path] for path, shapes in found[name]["placed"].items() if shapes[0] != whole[path]]
    kept = [whole[path] for path, shapes in found[name]["placed"].items() if shapes[0] == whole[path]]
    assert len(cut) > 8 and not [shape for shape in parts if shape in cut and shape not in kept]


def test_fsdp_gathers_parameters_and_not_activations(found):
    gathers = found["fsdp"]["gathers"]
    assert "16,3,4,4" in gathers and "4,4,16" in gathers and "16,64" in gathers, gathers
    assert not [shape for shape in gathers if shape.startswith("8,12,")], gathers


def compared(found, expected):
    """Weights after training have to be close; returns how far they are apart.

    Biases of keys are left out: softmax makes their gradient zero but for rounding, of which Adam makes whole steps.
    """
    assert [*found] == [*expected]
    far = {}
    for name, value in expected.items():
        distance = np.abs(found[name] - value)
        if name.endswith("c_attn.bias"):
            distance[len(distance) // 3 : 2 * len(distance) // 3] = 0
        far[name] = float(distance.max())
    assert max(far.values()) < 2e-4, far
    return max(far.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_one_device_saves(found, folder, name):
    one, many = (read_weights(folder / n, SMALL, "lm") for n in (f"one {'scan' in name}", name))
    print(name, compared(many, one))


def test_a_state_of_a_mesh_goes_on_on_one_device(found):
    one = found["one False"]
    np.testing.assert_allclose(one["after mesh"], one["after one"], rtol=0, atol=1e-5)


def test_parameters_are_made_on_the_mesh_or_moved_to_it(found):
    assert found["others"]["moved"] == 0 and found["others"]["made"] < 1e-6 and found["others"]["same shapes"]


@pytest.mark.parametrize("name", ["set", "not set"])
def test_explicit_axes_give_what_one_device_gives(found, folder, name):
    """For ids of the caller's mesh, on which the answers lie; training that goes on, and what callers do besides."""
    far = found["explicit"][name]
    print(name, far)
    assert len(far) == {"set": 14, "not set": 12}[name] and max(far.values()) < 1e-5
    losses = found["explicit"]["losses"]
    np.testing.assert_allclose(losses, found["one False"]["losses"][:4], rtol=0, atol=1e-5)
    config = GPT2Config.from_pretrained(folder / "pruned")
    assert (config.vocab_size, config.pruned_heads) == (40, {0: [1, 3]})


def test_specs_follow_from_named_axes():
    specs = param_specs(SMALL, FSDP | TENSOR)["transformer"]
    block = specs["h"]["0"]
    assert block["attn"]["c_attn"] == {"kernel": P("fsdp", None, "tensor", None), "bias": P(None, "tensor", None)}
    assert block["attn"]["c_proj"] == {"kernel": P("tensor", None, "fsdp"), "bias": P("fsdp")}
    assert block["mlp"]["c_fc"] == {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
    assert specs["wte"]["embedding"] == P(None, "fsdp") and specs["ln_f"]["scale"] == P("fsdp")
    assert param_specs(SMALL, {"vocab": "tensor"} | FSDP)["transformer"]["wte"]["embedding"] == P("tensor", "fsdp")
    stacked = param_specs(SMALL, TENSOR | {"layer": "data"}, scan_layers=True)["transformer"]["h"]["layers"]
    assert stacked["attn"]["c_attn"]["kernel"] == P("data", None, None, "tensor", None)
    assert all(set(spec) <= {None} for spec in flatten_dict(param_specs(SMALL, DATA)).values())


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"heads": "tensor"}, r"rules: expected named axes among .*, found 'heads'; did you mean 'head'\?"),
        ({"layer": "fsdp"}, r"found 'layer' \(only scanned layers have it\)"),
        ({"embed": "fsdp", "mlp": "fsdp"}, "'embed' and 'mlp' are both cut over 'fsdp', but .*c_fc.weight has both"),
        ({"head": "tensors"}, r"'head' is to be cut over the mesh axis 'tensors', .*; did you mean 'tensor'\?"),
    ],
)
def test_bad_rules_are_one_sentence(rules, sentence):
    mesh = make_mesh("", jax.devices()[:1])
    with pytest.raises(InputError, match=sentence):
        FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), mesh=mesh, rules=rules)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ("dat=2", r"mesh: expected the axes data, fsdp, tensor, found 'dat'; did you mean 'data'\?"),
        ("data=two", "mesh: expected a positive number for 'data', found 'two'; write for example data=2"),
        ("data=0", "expected a positive number for 'data', found '0'"),
        ("data=2,fsdp=3", "product is the number of devices, 1, found 'data=2,fsdp=3', which needs 6"),
    ],
)
def test_a_bad_mesh_is_one_sentence(shape, sentence):
    with pytest.raises(InputError, match=sentence):
        make_mesh(shape, jax.devices()[:1])


class Eight:
    """A mesh of 8 devices, as far as checks look at it."""

    shape = {"data": 4, "fsdp": 2, "tensor": 3}  # noqa: RUF012
    axis_names = (*shape,)


def test_parts_have_to_be_equal():
    from gpt2_multi.flax.parameters.sharding import param_shardings

    with pytest.raises(InputError, match=r"c_attn.weight: the axis 'head' has 4 entries, which 3 devices"):
        param_shardings(SMALL, Eight(), TENSOR)


def test_rules_without_a_mesh_are_refused():
    with pytest.raises(InputError, match="rules: expected a mesh beside them, found none"):
        FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), rules=FSDP)


def test_a_mesh_of_one_device_works_too():
    mesh = make_mesh("", jax.devices()[:1])
    model = FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), mesh=mesh, rules=FSDP | TENSOR)
    moved = shard_params(model.params, model.config, mesh, DATA)
    assert moved["transformer"]["wte"]["embedding"].sharding.spec == P(None, None)
    batch = shard_batch({"input_ids": np.zeros((2, 3, 4))}, mesh, micro=True)
    assert batch["input_ids"].sharding.spec == P(None, ("data", "fsdp"))


# --- the example, in one process and in two

PLAN = "--steps 6 --batch-size 8 --micro-batches 2 --length 12 --learning-rate 1e-2 --warmup 2"
OFTEN = "--eval-every 2 --save-every 3"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A function that starts the example on a small model and text."""
    pytest.importorskip("matplotlib")
    where = tmp_path_factory.mktemp("example")
    config = SMALL.replace(vocab_size=1024, n_layer=1, resid_pdrop=0.1)
    fixtures.write_model(where / "model", config, "lm", dtype=np.float32)
    (where / "text.txt").write_text("To be, or not to be: that is the question.\n" * 120, encoding="utf-8")

    def options(output, *more):
        files = ("--text", where / "text.txt", "--model", where / "model", "--output", where / output)
        return [*map(str, files), *PLAN.split(), *OFTEN.split(), *more]

    def begin(output, *more, devices=8, script=(str(ROOT / "examples" / "train_flax.py"),)):
        return start(*script, *options(output, *more), devices=devices)

    begin.where, begin.options = where, options
    return begin


def results(example, name):
    """The losses and the weights that a run has written."""
    where = example.where / name
    config = GPT2Config.from_json_file(where / "config.json")
    return json.loads((where / "losses.json").read_text()), read_weights(where, config, "lm")


MESH = ("--mesh", "data=2,fsdp=2,tensor=2")


@pytest.fixture(scope="module")
def whole(example):
    """A run of the example on 8 devices."""
    finished(example("whole", *MESH))
    return results(example, "whole")


EXPLICIT = """
import sys, jax
sys.path.insert(0, "examples")
import train_flax
train_flax.make_mesh = lambda shape: jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
train_flax.main()
"""


def test_the_example_writes_a_model_and_goes_on_bit_by_bit(example, whole):
    """Its first part is run on a mesh of explicit axes, as a line of the user's own would make it."""
    assert "after 4 updates" in finished(example("again", "--stop-at", "4", script=("-c", EXPLICIT)))
    assert "after 6 updates" in finished(example("again", *MESH, "--resume"))
    losses, weights = results(example, "again")
    assert losses["train"] == whole[0]["train"] and len(losses["train"]) == 6
    assert losses["train"][-1] < losses["train"][0] and losses["held_out"][-1] == whole[0]["held_out"][-1]
    assert all(np.array_equal(weights[name], value) for name, value in whole[1].items())
    files = {path.name for path in (example.where / "again").iterdir()}
    assert files >= {"config.json", "model.safetensors", "vocab.json", "merges.txt", "losses.png", "states"}


def test_a_run_does_not_go_on_with_another_plan(example, whole, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    result = CliRunner().invoke(
        importlib.import_module("train_flax").main, example.options("whole", "--resume", "--seed", "1")
    )
    assert "--seed was 0, found 1" in result.output and result.exit_code == 1


def test_two_processes_train_together(example, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = ("--coordinator", host, "--processes", "2", "--process-id")
    pair = [example("two", *MESH, *hosts, str(i), "--stop-at", "4", devices=4) for i in range(2)]
    outs = [finished(process) for process in pair]
    assert "after 4 updates" in outs[0] and "updates" not in outs[1]
    finished(example("two", *MESH, "--resume"))  # in one process, from the state that two have saved
    losses, weights = results(example, "two")
    print("two processes", np.abs(np.subtract(losses["train"], whole[0]["train"])).max(), compared(weights, whole[1]))
    np.testing.assert_allclose(losses["train"], whole[0]["train"], rtol=0, atol=1e-5)


if THOROUGH:  # that a mesh gives the losses of one device, tests/flax/devices.py asks of every mesh

    def test_one_device_gives_the_losses_of_eight(example, whole):
        finished(example("one", devices=1))
        np.testing.assert_allclose(results(example, "one")[0]["train"], whole[0]["train"], rtol=0, atol=1e-5)
