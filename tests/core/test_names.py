"""Checkpoints of other programs: what stands before the names, what stands beside, and what no file says."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from gpt2_multi_conversion import convert, inspect, open, verify
from gpt2_multi_conversion.cli import main

from gpt2_multi.errors import CheckpointError, ConfigError, InputError
from gpt2_multi.files.containers import read_msgpack, read_safetensors, write_msgpack, write_safetensors, write_torch
from gpt2_multi.model.checkpoint import load
from gpt2_multi.model.checkpoint.names import named
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.table import FORMATS
from tests.support.fixtures import DATA, write_model

TRAINERS = DATA / "trainers"  # which its make.py made
REFERENCE = TRAINERS / "reference"
FILES = {
    "lightning": ("lightning/last.ckpt", "state_dict.model._orig_mod."),
    "a folder that holds one": ("lightning", "state_dict.model._orig_mod."),
    "compiled in parallel": ("compiled.pt", "model_state_dict.module._orig_mod."),
    "deepspeed, in halves": ("mp_rank_00_model_states.pt", "module."),
}


def assert_same(found, expected):
    assert set(expected) == set(found)
    for name, array in expected.items():
        assert np.array_equal(found[name], array.astype(found[name].dtype)), name


def write(path, tensors, writer=write_safetensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer(path, {name: (x.dtype, x.shape, lambda x=x: x) for name, x in tensors.items()})
    return path.parent


@pytest.fixture
def tensors():
    """The reference's tensors by transformers' names."""
    return dict(read_safetensors(REFERENCE / "model.safetensors"))


def placed(folder, tensors):
    """A folder with these tensors and the reference's configuration."""
    write(folder / "model.safetensors", tensors)
    shutil.copy(REFERENCE / "config.json", folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_files_of_programs_that_train(tmp_path, name):
    """Read bit for bit, converted, and what stood before the names is in the report; what else they hold is not run."""
    file, prefix = FILES[name]
    assert_same(open(TRAINERS / file, n_head=2), open(REFERENCE))
    report = convert(TRAINERS / file, tmp_path / "new", n_head=2)
    assert json.loads((tmp_path / "new" / "conversion.json").read_text())["prefix"] == report.prefix == prefix
    assert f"{prefix}lm_head.weight" in report.dropped
    assert inspect(TRAINERS / file, n_head=2).prefix == prefix
    assert verify(TRAINERS / file, tmp_path / "new", n_head=2).ok
    assert_same(open(tmp_path / "new"), open(REFERENCE))
    assert open(tmp_path / "new").config.n_head == 2


def test_a_value_head_is_named_and_dropped_on_request(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"v_head\.summary\.bias, v_head.*; .*drop='v_head\.summary\.\*' \(--drop\)"
    ):
        open(TRAINERS / "trl")
    assert_same(open(TRAINERS / "trl", drop="v_head.*"), open(REFERENCE))
    several = {**read_safetensors(REFERENCE / "model.safetensors"), "v_head.bias": np.zeros(1), "scale": np.ones(1)}
    with pytest.raises(CheckpointError, match=r"scale, v_head\.bias; .*patterns of their names in drop=\[\.\.\.\] "):
        open(placed(tmp_path / "several", several))
    call = ["convert", str(TRAINERS / "trl"), str(tmp_path / "new"), "--drop", "v_head.*"]
    assert "dropped: v_head.summary.weight" in CliRunner().invoke(main, call).output
    with pytest.raises(InputError, match=r"drop: .*trl has no tensor named 'v_haed\.\*'; its names are such as "):
        open(TRAINERS / "trl", drop=["v_head.*", "v_haed.*"])


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.module.model.", "any thing, at-all/", "transformer.", "h.0.", "."]
)
@pytest.mark.parametrize("rooted", [True, False])
def test_anything_may_stand_before_the_names(tmp_path, tensors, prefix, rooted):
    if prefix == "transformer." and not rooted:
        prefix, rooted = "", True
    names = {name: name if rooted else name.removeprefix("transformer.") for name in tensors}
    folder = placed(tmp_path / "m", {prefix + names[name]: x for name, x in tensors.items()})
    found = open(folder)
    assert found.names.prefix == prefix
    assert_same(found, open(REFERENCE))
    assert open(folder, prefix=prefix).names.prefix == prefix


@pytest.mark.parametrize("format", ["flax-msgpack", "tf-h5", "openai", "nanogpt", "keras-weights"])
def test_other_formats_have_prefixes_too(tmp_path, format):
    convert(REFERENCE, tmp_path / "m", to=format, force=True)
    kind = FORMATS[format]
    (main,) = [path for path in (tmp_path / "m").iterdir() if path.match(kind.main[0])]
    wrapped = {f"params/{name}": x for name, x in kind.read(main).items()}
    names = named(wrapped, kind.spelling, "here")
    assert names.prefix == "params/"
    assert set(names.tensors) == set(kind.read(main))


def test_parameters_of_flax_below_a_key(tmp_path):
    convert(REFERENCE, tmp_path / "m", to="flax-msgpack")
    tensors = read_msgpack(tmp_path / "m" / "flax_model.msgpack")
    write(tmp_path / "new" / "state.msgpack", {f"params/{name}": x for name, x in tensors.items()}, write_msgpack)
    assert_same(open(tmp_path / "new", n_head=2), open(REFERENCE))


def test_a_training_of_flax_holds_its_moments_too(tmp_path):
    """Which look like models: what flax.serialization makes of a TrainState is refused until one is chosen."""
    convert(REFERENCE, tmp_path / "m", to="flax-msgpack")
    tree = (tmp_path / "m" / "flax_model.msgpack").read_bytes()
    state = b"\x83\xa4step\xcd\x01\x00\xa6params" + tree + b"\xa9opt_state\x81\xa10\x82\xa2mu" + tree + b"\xa2nu" + tree
    (tmp_path / "m" / "flax_model.msgpack").write_bytes(state)
    with pytest.raises(CheckpointError, match=r"holds 3 GPT-2s.*choose one of them with prefix='params/'"):
        open(tmp_path / "m")
    assert_same(open(tmp_path / "m", prefix="params/"), open(REFERENCE))


def test_two_models_are_refused_until_one_is_chosen(tmp_path, tensors):
    both = {f"{who}.{name}": x + (who == "ref") for name, x in tensors.items() for who in ("policy", "ref.module")}
    folder = placed(tmp_path / "m", {**both, "value.weight": np.zeros(8, np.float32)})
    with pytest.raises(
        CheckpointError, match=r"holds 2 GPT-2s, their names after 'policy\.' and 'ref\.module\.'; choose"
    ):
        open(folder)
    for prefix in ("policy.", "policy", "policy.transformer."):
        assert_same(open(folder, prefix=prefix), open(REFERENCE))
    chosen = open(folder, prefix="ref")
    assert chosen.names.prefix == "ref.module."
    assert {"value.weight", "policy.transformer.wte.weight"} < set(chosen.dropped)
    with pytest.raises(
        InputError, match=r"prefix: .*m has no GPT-2 below 'polcy\.'; what stands before the names is 'po"
    ):
        open(folder, prefix="polcy.")
    with pytest.raises(CheckpointError, match=r"has unexpected the tensor value\.weight; .*drop='value\.weight'"):
        open(folder, drop="ref.*")
    assert_same(open(folder, drop=["ref.*", "value.weight"]), open(REFERENCE))
    first = placed(tmp_path / "first", {**tensors, **{f"ref.{name}": x for name, x in tensors.items()}})
    for odd in ("", "a."):
        folder = placed(tmp_path / f"odd{odd}", {**{f"a.{name}": x for name, x in tensors.items()}, odd: np.zeros(1)})
        with pytest.raises(CheckpointError, match="has unexpected the tensor"):
            open(folder)
    with pytest.raises(CheckpointError, match=r"first has unexpected 28 tensors: ref\..*drop='ref\.transformer\.\*'"):
        open(first)  # nothing stands before the names of one of them: that is the model
    assert_same(open(first, drop="ref.*"), open(REFERENCE))
    inner = placed(tmp_path / "inner", {f"a.{name}": x for name, x in {**tensors, "b.wpe.weight": np.zeros(1)}.items()})
    with pytest.raises(CheckpointError, match=r"names after 'a\.'\) has unexpected the tensor b\.wpe\.weight"):
        open(inner)
    for name, value in (("prefix", 3), ("drop", 3), ("drop", [3])):
        with pytest.raises(InputError, match=rf'{name}: expected .* such as "(policy\.|v_head\.\*)", found an int'):
            open(first, **{name: value})


def test_heads_may_stand_above_the_body(tmp_path, tensors):
    body = {f"model.inner.{name}": x for name, x in tensors.items()}
    untied = tensors["transformer.wte.weight"] + 1
    for name in (
        "lm_head.weight",
        "model.lm_head.weight",
        "model.inner.lm_head.weight",
        "model.lm_head.decoder.weight",
    ):
        folder = placed(tmp_path / name, {**body, name: untied})
        (folder / "config.json").unlink()
        found = open(folder, n_head=2)
        assert not found.config.tie_word_embeddings
        assert np.array_equal(found["lm_head.weight"], untied)
    twice = placed(tmp_path / "twice", {**body, "lm_head.weight": untied, "model.lm_head.weight": untied})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight and model\.lm_head\.weight are both lm_head\.weight; leave"
    ):
        open(twice)


def test_names_may_be_mapped_as_in_transformers(tmp_path, tensors):
    folder = placed(tmp_path / "m", {name.replace("h.", "layers."): x for name, x in tensors.items()})
    with pytest.raises(CheckpointError, match="lacks 24 tensors"):
        open(folder)
    mapping = {r"^transformer\.layers\.": "h.", r"^transformer\.": ""}
    assert_same(load(folder, "lm", None, {"key_mapping": mapping}).arrays, open(REFERENCE))


@pytest.mark.parametrize("file", ["model.pt", "last.ckpt", "best.bin"])
def test_masks_of_old_transformers_are_not_mingpts(tmp_path, tensors, file):
    """Both have `attn.bias` and a head of its own; the kernels of one are (in, out)."""
    mask = np.tril(np.ones((1, 1, 4, 4), np.uint8))
    masks = {name.replace("c_attn.bias", "bias"): mask for name in tensors if name.endswith("c_attn.bias")}
    old = {**tensors, **masks, "lm_head.weight": tensors["transformer.wte.weight"]}
    write(tmp_path / file, {f"module.{name}": x for name, x in old.items()}, write_torch)
    found = open(tmp_path / file, n_head=2)
    assert found.format == "pytorch" and set(masks) <= set(found.unused)
    assert_same(found, open(REFERENCE))


def test_names_of_2019(tmp_path, tensors):
    choice = {"linear.weight": np.ones((1, 8), np.float32), "linear.bias": np.ones(1, np.float32)}
    old = {**tensors, **{f"multiple_choice_head.{name}": x for name, x in choice.items()}}
    old["lm_head.decoder.weight"] = tensors["transformer.wte.weight"]
    found = open(placed(tmp_path / "m", old))
    assert found.head == "double_heads"
    assert found.dropped == ["lm_head.decoder.weight"]
    assert found["multiple_choice_head.summary.weight"].tolist() == np.ones((1, 8)).tolist()


def test_what_is_no_gpt2_says_what_it_has(tmp_path):
    folder = placed(tmp_path / "m", {"bert.encoder.layer.0.weight": np.zeros(1), "bert.pooler": np.zeros(1)})
    with pytest.raises(CheckpointError, match=r"none of its 2 tensors is named as one of a GPT-2.*found bert\.encoder"):
        open(folder)
    assert [tensor.remark for tensor in inspect(folder).tensors] == ["unknown"] * 2
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 tensors is named as one of a GPT-2.*found bert\.encoder"):
        open(folder)


HEADS = {
    "lm": {},
    "double_heads": {"summary_proj_to_labels": False},
    "sequence_classification": {"num_labels": 5, "n_inner": 24},
    "token_classification": {"num_labels": 3, "tie_word_embeddings": False},
    "question_answering": {},
    "base": {"add_cross_attention": True},
}
NEED_SETTINGS = ("keras-hub",)


def cases():
    """Each format with each head that it has; those of programs that only write texts with theirs."""
    for format in FORMATS:
        heads = FORMATS[format].heads
        yield from ((format, head) for head in (heads if len(heads) > 2 else heads[:1]) if format not in NEED_SETTINGS)


@pytest.mark.parametrize(("format", "head"), list(cases()))
def test_sizes_are_in_the_shapes(tmp_path, format, head):
    """Without config.json the same tensors, and the same configuration."""
    kind, settings = FORMATS[format], dict(HEADS[head])
    settings |= {name: allowed[0] for name, allowed in kind.fixed.items() if name != "layer_norm_epsilon"}
    if "tie_word_embeddings" in kind.no_room:
        settings.pop("tie_word_embeddings", None)
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=3, n_head=2, **settings)
    write_model(tmp_path / "m", config, head, dtype=np.float32)
    convert(tmp_path / "m", tmp_path / "new", to=format)
    expected = dict(open(tmp_path / "new"))
    for name in ("config.json", "hparams.json"):
        (tmp_path / "new" / name).unlink(missing_ok=True)
    if format == "keras-weights" and head in ("sequence_classification", "question_answering"):
        with pytest.raises(CheckpointError, match="do not say what its head is for; give config="):
            open(tmp_path / "new", n_head=2)
        return
    found = open(tmp_path / "new", n_head=2)
    assert_same(found, expected)
    same = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "num_labels", "add_cross_attention")
    for name in (*same, "summary_proj_to_labels", "activation"):
        assert getattr(found.config, name) == getattr(config, name), name
    assert (found.head, found.guessed) == ("lm" if head == "base" else head, "")


def test_heads_are_in_no_shape(tmp_path):
    write_model(tmp_path / "m", GPT2Config(vocab_size=5, n_positions=4, n_embd=128, n_layer=1, n_head=2), "lm")
    (tmp_path / "m" / "config.json").unlink()
    report = convert(tmp_path / "m", tmp_path / "new")
    assert open(tmp_path / "new").config.n_head == 2
    assert [sentence for sentence in report.warnings if "n_head is 2 by 64 numbers a head" in sentence]
    assert "n_head is 2 by 64 numbers a head" in CliRunner().invoke(main, ["inspect", str(tmp_path / "m")]).output
    with pytest.warns(UserWarning, match="n_head is 2 by 64 numbers a head") as warned:
        assert load(tmp_path / "m", "lm", None, {"eos_token_id": 3}).config.n_head == 2
    assert len(warned) == 1
    assert load(tmp_path / "m", "lm", None, {"num_attention_heads": 4}).config.n_head == 4
    assert load(tmp_path / "m", "lm", open(tmp_path / "new").config.replace(n_head=8), {}).config.n_head == 8
    with pytest.raises(CheckpointError, match=r"n_embd 8 is no multiple of 64.*give config="):
        open(TRAINERS / "compiled.pt")
    with pytest.raises(ConfigError, match="n_embd must be a multiple of n_head"):
        open(TRAINERS / "compiled.pt", n_head=3)
    lacking = placed(tmp_path / "lacking", {"h.0.ln_1.weight": np.zeros(8)})
    (lacking / "config.json").unlink()
    with pytest.raises(CheckpointError, match="and lacks a whole wte, wpe or "):
        open(lacking)


@pytest.mark.parametrize("format", ["safetensors", "tf-h5", "flax-msgpack", "openai", "nanogpt", "keras-hub"])
def test_padded_tables_are_cut_on_request(tmp_path, format):
    convert(REFERENCE, tmp_path / "padded", to=format, force=True)
    call = ["convert", str(tmp_path / "padded"), str(tmp_path / "cut"), "--vocab-size", "11", "--n-positions", "5"]
    assert CliRunner().invoke(main, call).exit_code == 0
    report = json.loads((tmp_path / "cut" / "conversion.json").read_text())
    assert {"16 to 11 rows", "8 to 5 rows"} == set(report["cut"].values())
    found, whole = open(tmp_path / "cut"), open(REFERENCE)
    rows = {"wte.weight": 11, "wpe.weight": 5}
    assert_same(found, {name: whole[name][: rows.get(name)] for name in whole})
    assert (found.config.vocab_size, found.config.n_positions) == (11, 5)
    for name, size in (("vocab_size", 17), ("n_positions", 9)):
        with pytest.raises(CheckpointError, match=rf"{name}: expected at most {size - 1}, as .*, found {size}"):
            open(tmp_path / "padded", **{name: size})


def test_several_files_of_other_names_are_not_guessed(tmp_path, tensors):
    write(tmp_path / "s" / "a.safetensors", tensors)
    assert_same(open(tmp_path / "s", n_head=2), open(REFERENCE))
    write(tmp_path / "m" / "a.pth", tensors, write_torch)
    assert_same(open(tmp_path / "m", n_head=2), open(REFERENCE))
    write(tmp_path / "m" / "b.pt", tensors, write_torch)
    with pytest.raises(CheckpointError, match=r"expected one file of weights, found b\.pt, a\.pth; give the one"):
        open(tmp_path / "m", n_head=2)
    assert_same(open(tmp_path / "m" / "a.pth", n_head=2), open(REFERENCE))


def test_adapters_inside_a_model_are_told(tmp_path, tensors):
    inside = {name.replace("c_attn.", "c_attn.base_layer."): x for name, x in tensors.items()}
    write(tmp_path / "m" / "model.safetensors", {f"base_model.model.{name}": x for name, x in inside.items()})
    with pytest.raises(
        CheckpointError, match=r"has adapters of PEFT in it \(.*base_layer.*\); save what model\.merge_and"
    ):
        open(tmp_path / "m", n_head=2)
