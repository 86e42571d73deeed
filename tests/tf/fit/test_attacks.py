"""What a second round of hostile use found, so that it stays mended: traces, files, and calls while tracing."""

import logging
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import tf as tfm
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.files import folders
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.options import Options
from gpt2_multi.generation.stopping import stop_table
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf.generation import rules
from gpt2_multi.tf.generation.decoders import Decoders

SMALL = GPT2Config(
    vocab_size=40, n_positions=24, n_embd=12, n_layer=2, n_head=3, eos_token_id=None, initializer_range=0.4
)
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
GRAPH = {"max_new_tokens": 4, "jit_compile": False}


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    return tfm.TFGPT2LMHeadModel(SMALL.replace())


def greedy(model, ids, new):
    """What `generate` should give, without its functions."""
    for _ in range(new):
        chosen = tf.argmax(model(ids, use_cache=False).logits[:, -1], -1)
        ids = np.concatenate([ids, chosen[:, None]], 1)
    return ids


def quantize(model):
    model.quantize("int8")
    for layer in model.owners().values():  # other values, since the old texts may survive the rounding
        if getattr(layer, "quantization_mode", None) and hasattr(layer, "kernel_scale"):
            layer.kernel_scale.assign(layer.kernel_scale / 4)


def adapt(model):
    for block in model.transformer.h:
        block.attn.c_attn.enable_lora(2)
        block.attn.c_attn.lora_kernel_b.assign(tf.ones_like(block.attn.c_attn.lora_kernel_b))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2
@pytest.mark.parametrize("change", [quantize, adapt])
def test_generation_knows_a_model_s_new_variables(change, model):
    before = model.generate(IDS, **GRAPH).numpy()
    change(model)
    after = model.generate(IDS, **GRAPH).numpy()
    assert np.array_equal(after, greedy(model, IDS, 4)) and not np.array_equal(after, before)


def test_checkpoints_of_tensorflow_hold_every_block(model, tmp_path):
    path = tf.train.Checkpoint(model=model).save(tmp_path / "x")
    keras.utils.set_random_seed(1)
    other = tfm.TFGPT2LMHeadModel(SMALL.replace())
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


@pytest.mark.parametrize("shape", [(None, None), (2, None), (None, 7)])
def test_generation_in_a_function_of_any_shape(shape, model):
    outer = tf.function(lambda ids: model.generate(ids, **GRAPH), input_signature=[tf.TensorSpec(shape, tf.int32)])
    assert np.array_equal(outer(IDS), model.generate(IDS, **GRAPH))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", [(1, 25), (None, 25)])
def test_a_length_that_is_known_while_tracing_is_checked(shape, jit, model):
    function = tf.function(lambda ids: model(ids).logits, jit_compile=jit)
    with pytest.raises(InputError, match="25 tokens are more than n_positions 24"):
        function.get_concrete_function(tf.TensorSpec(shape, tf.int32))
    mask = tf.TensorSpec(shape, tf.int32)  # may hide a token, so that 24 positions do
    tf.function(lambda ids, mask: model(ids, attention_mask=mask).logits).get_concrete_function(mask, mask)


TRACED = {
    "too long a text": (lambda m, x: m.generate(x, max_new_tokens=18), (2, 7), "7 prompt tokens and 18 new ones are"),
    "no length for max_length": (
        lambda m, x: m.generate(x, max_length=9),
        (2, None),
        "max_length: the prompt's length",
    ),
    "no rank": (lambda m, x: m(x).logits, None, "found a tensor whose rank is not known while tracing"),
    "no rank to generate": (lambda m, x: m.generate(x), None, "found a tensor whose rank is not known while tracing"),
}


@pytest.mark.parametrize("name", TRACED)
def test_what_is_wrong_while_tracing_is_one_sentence(name, model):
    call, shape, sentence = TRACED[name]
    with pytest.raises(InputError, match=sentence) as error:
        tf.function(lambda x: call(model, x)).get_concrete_function(tf.TensorSpec(shape, tf.int32))
    assert "\n" not in str(error.value)


CALLS = {
    "no prompt": (lambda m: m.generate(None), "input_ids: expected ids or texts, found None"),
    "a ragged tensor": (lambda m: m(tf.ragged.constant([[1], [1, 2]])), "found RaggedTensor; make it dense"),
    "rows of objects": (
        lambda m: m(np.array([[1, 2], [3]], object)),
        "input_ids: expected rows of numbers, all of one",
    ),
    "bytes": (lambda m: m(IDS.astype(np.uint8)), "found uint8; ids are int32 or int64"),
    "a mask of strings": (
        lambda m: m(IDS, attention_mask=IDS.astype(str)),
        "attention_mask: expected numbers, found str",
    ),
    "a prompt's mask of strings": (lambda m: m.generate(IDS, IDS.astype(str)), "attention_mask: expected numbers"),
}


@pytest.mark.parametrize("name", CALLS)
def test_odd_inputs_are_one_sentence(name, model):
    call, sentence = CALLS[name]
    with pytest.raises(InputError, match=sentence) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_options_beyond_32_bits_do_not_wrap_around():
    most = 2**31 - 1
    config = GenerationConfig(
        top_k=2**32 + 1, min_length=2**32 + 1, no_repeat_ngram_size=2**32 + 1, eos_token_id=[3, 2**32 + 1]
    )
    options = rules.as_tensors(Options.of(config, stop_table([], None, 9), [0]))
    assert options.top_k == options.min_length == options.no_repeat_ngram_size == most
    assert options.ends.numpy().tolist() == [3, most] + [-1] * 30


def test_n_grams_longer_than_the_text_repeat_nothing(model):
    expected = model.generate(IDS, **GRAPH).numpy()
    for size in (12, 19, 10**9):
        assert np.array_equal(model.generate(IDS, no_repeat_ngram_size=size, **GRAPH), expected)


def test_another_number_of_end_tokens_traces_nothing_and_traces_warn_of_nothing(model, caplog):
    with caplog.at_level(logging.WARNING, "tensorflow"):
        for rows in range(1, 7):
            model.generate(IDS[:1].repeat(rows, 0), eos_token_id=list(range(rows % 4)), **GRAPH)
    functions = Decoders.of(model, False)
    counts = [part.experimental_get_tracing_count() for part in (functions.prefill, functions.decode)]
    assert counts == [2, 2] and not caplog.records


def test_a_row_in_which_every_token_is_banned_is_what_pytorch_makes_of_it():
    torch = pytest.importorskip("torch")
    from gpt2_multi.pt.generation import rules as pt_rules

    logits = np.full((2, 9), -np.inf)
    logits[1, 4:7] = 1.0
    kept = rules.Kept(tf.constant(logits), rules.first_few(tf.constant(logits)))
    ours = rules.sample(kept, tf.constant([[3, 0], [4, 0]], tf.uint32), tf.constant(0))
    streams = torch.tensor([[3, 0], [4, 0]], dtype=torch.int32)
    theirs = pt_rules.sample(pt_rules.Kept(torch.tensor(logits)), streams, 0)
    assert ours.numpy().tolist() == theirs.tolist() and ours[0] == 0


def test_saving_warns_of_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)  # warnings are errors here


def test_an_export_is_followed_through_links_and_from_inside(model, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    model.export_saved_model(tmp_path / "link", max_new_tokens=1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "saved_model.pb").exists()
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    model.export_saved_model(".", max_new_tokens=1)
    assert (tmp_path / "inside" / "saved_model.pb").exists() and Path("saved_model.pb").exists()


def test_an_export_without_a_place_or_without_room_is_one_sentence(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a folder to save the model in, found none"):
        model.export_saved_model(tmp_path / "file" / "x", max_new_tokens=1)
    with pytest.raises(InputError, match="1 prompt tokens and 24 new ones are more than n_positions 24"):
        model.export_saved_model(tmp_path / "x", max_new_tokens=24)


def test_an_export_that_is_stopped_leaves_the_old_one(model, tmp_path, monkeypatch):
    target = tmp_path / "m"
    target.mkdir()
    (target / "saved_model.pb").write_text("old")
    monkeypatch.setattr(tf.saved_model, "save", lambda root, stage, signatures: None)
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: None)  # a system that cannot do it in one step
    rename = type(target).rename

    def stopped(path, to):
        if to == target and not path.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(type(target), "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.export_saved_model(target, max_new_tokens=1)
    assert (target / "saved_model.pb").read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_an_unknown_setting_is_not_mistaken_for_one_of_our_own(tmp_path):
    with pytest.raises(TypeError, match="from_pretrained has no argument 'from_disk'") as error:
        tfm.TFGPT2LMHeadModel.from_pretrained("demo", from_disk=True)
    assert "from_file" not in str(error.value)
