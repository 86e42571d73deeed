"""Conversion: every fixture opens and computes what it should, and every format becomes every other, bit for bit."""

import itertools
import random
import subprocess
import sys
from fractions import Fraction

import gpt2_multi_conversion as conversion
import ml_dtypes
import numpy as np
import pytest

from gpt2_multi.errors import CheckpointError
from gpt2_multi.files.containers.safetensors import read_safetensors
from gpt2_multi.model import reference
from gpt2_multi.model.checkpoint import write_weights
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import ARCHITECTURES
from gpt2_multi.model.formats.table import FORMATS
from gpt2_multi.model.weights import parameter_count, table
from tests.support import fixtures
from tests.support.effort import some
from tests.support.fixtures import write_model
from tests.support.shared_data import shared

LM_FORMATS = {  # folder -> its format, the model whose weights it has, and its head
    "bfloat16_safetensors": ("safetensors", "lm", "lm"),
    "float16_safetensors": ("safetensors", "lm", "lm"),
    "sharded_safetensors": ("safetensors", "lm", "lm"),
    "tf_safetensors": ("tf-safetensors", "lm", "lm"),
    "pytorch_bin": ("pytorch", "lm", "lm"),
    "pytorch_bin_2019": ("pytorch", "lm", "lm"),
    "sharded_pytorch_bin": ("pytorch", "lm", "lm"),
    "tf_h5": ("tf-h5", "lm", "lm"),
    "tf_h5_base": ("tf-h5", "base", "base"),
    "tf_h5_double_heads": ("tf-h5", "double_heads", "double_heads"),
    "tf_h5_sequence_classification": ("tf-h5", "sequence_classification", "sequence_classification"),
    "flax_msgpack": ("flax-msgpack", "lm", "lm"),
    "flax_msgpack_base": ("flax-msgpack", "base", "base"),
}
COARSE = {"bfloat16_safetensors": 0.2, "float16_safetensors": 0.02}  # what rounding the weights does to the logits
OTHERS = {  # folder -> its format, and where the logits lie
    "openai_tf1": "openai",
    "nanogpt/bias": "nanogpt",
    "nanogpt/no_bias": "nanogpt",
    "keras_hub": "keras-hub",
}


def numbers(checkpoint):
    return {name: np.asarray(checkpoint[name], np.float64) for name in checkpoint}


def close(found, expected, rtol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_the_fixtures_are_all_here():
    assert {path.name for path in shared("fixtures", "lm_formats").iterdir()} == set(LM_FORMATS)


@pytest.mark.parametrize("name", LM_FORMATS)
def test_what_transformers_writes_is_read(name):
    format, model, head = LM_FORMATS[name]
    checkpoint = conversion.open(shared("fixtures", "lm_formats", name))
    assert (checkpoint.format, checkpoint.head) == (format, head)
    given = fixtures.config(model)
    for setting in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "activation_function", "id2label"):
        assert getattr(checkpoint.config, setting) == getattr(given, setting)
    if name not in COARSE:
        plain = conversion.open(fixtures.folder(model))
        assert plain.keys() == checkpoint.keys()
        assert all(np.array_equal(plain[key], checkpoint[key]) for key in plain)
    case = {"sequence_classification": "single", "double_heads": "double"}.get(model, "plain")
    found = reference.outputs(checkpoint.config, numbers(checkpoint), head, fixtures.cases(model)[case])
    for key in {"logits", "mc_logits", "last_hidden_state"} & found.keys():
        expected = fixtures.reference(model)[f"{case}.{key}"]
        keep = fixtures.cases(model)[case].get("attention_mask") if key == "logits" and found[key].ndim == 3 else None
        assert found[key].shape == expected.shape and (keep is None or keep.all())
        close(found[key], expected, COARSE.get(name, 1e-4))


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_write_is_read(name):
    folder = shared("fixtures", name)
    checkpoint = conversion.open(folder)
    assert (checkpoint.format, checkpoint.head) == (OTHERS[name], "lm")
    sizes = {"vocab_size": 503, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 4}
    assert {key: getattr(checkpoint.config, key) for key in sizes} == sizes
    assert checkpoint.config.activation_function == ("gelu" if "nanogpt" in name else "gelu_new")
    expected = read_safetensors(folder / "reference.safetensors")
    (ids,) = [array for array in expected.values() if array.dtype.kind == "i"]
    found = reference.outputs(checkpoint.config, numbers(checkpoint), "lm", {"input_ids": ids})
    close(found["logits"], expected["logits"])
    if name == "openai_tf1":
        present = np.stack([[found[f"past.{i}.key"], found[f"past.{i}.value"]] for i in range(3)])
        close(present.transpose(2, 0, 1, 3, 4, 5), expected["present"])


@pytest.mark.parametrize("name", ["cross_attention", "question_answering", "token_classification", *fixtures.VARIANTS])
def test_models_of_every_head_and_variant_are_read(name):
    checkpoint = conversion.open(fixtures.folder(name))
    assert (checkpoint.format, checkpoint.head) == ("safetensors", fixtures.head(name))
    assert checkpoint.config == fixtures.config(name)
    expected = fixtures.weights(name)
    assert checkpoint.keys() == expected.keys() and len(checkpoint) == len(table(checkpoint.config, checkpoint.head))
    assert all(np.array_equal(checkpoint[key], expected[key]) for key in expected)


DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


EXACT = {"nanogpt", "mingpt-2020"}  # whose programs compute with the exact GELU


def random_model(rng, formats):
    """A configuration and a head that both formats hold."""
    n_head, head_dim = rng.choice([(1, 3), (2, 5), (3, 2), (4, 4)])
    config = GPT2Config(
        vocab_size=rng.choice([7, 13, 32]), n_positions=rng.choice([4, 9]), n_embd=n_head * head_dim,
        n_layer=rng.choice([1, 2, 11]), n_head=n_head, bos_token_id=0, eos_token_id=0, num_labels=rng.choice([1, 2, 5]),
        activation_function="gelu" if EXACT.intersection(formats) else "gelu_new",
        summary_proj_to_labels=rng.random() < 0.5,
    )  # fmt: skip
    kinds = [FORMATS[name] for name in formats]
    changes = {"n_inner": 17, "add_cross_attention": True, "tie_word_embeddings": False}
    for name, value in changes.items():
        if rng.random() < 0.5 and not any(name in kind.no_room for kind in kinds):
            config = config.replace(**{name: value})
    head = rng.choice([head for head in ARCHITECTURES if all(head in kind.heads for kind in kinds)])
    if head not in ("lm", "double_heads"):
        config = config.replace(tie_word_embeddings=True)
    return config.replace(architectures=[ARCHITECTURES[head]]), head


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMATS, FORMATS)))
def test_every_format_becomes_every_other_bit_for_bit(tmp_path, source, target):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    held = [dtype for dtype in DTYPES if all(dtype in (FORMATS[name].dtypes or DTYPES) for name in (source, target))]
    for dtype in rng.sample(held, some(2, 1)):
        config, head = random_model(rng, (source, target))
        arrays = write_model(tmp_path / dtype / "0", config, head, seed, DTYPES[dtype])
        for step, to in enumerate([source, target, "safetensors"], 1):
            before, after = tmp_path / dtype / str(step - 1), tmp_path / dtype / str(step)
            report = conversion.convert(before, after, to=to, force=True)
            assert not report.cast and not report.missing and report.parameters == parameter_count(config, head)
            opened = conversion.open(after)
            assert (opened.format, opened.head) == (to, head)
            assert opened.keys() == arrays.keys()
            for name, array in arrays.items():
                assert opened[name].dtype == array.dtype and opened[name].shape == array.shape
                assert opened[name].tobytes() == array.tobytes(), name
        assert opened.config == config.replace(dtype=dtype)


def exact(value):
    """A float64 in bfloat16, by fractions: to the nearest, ties to even."""
    found = np.array([value]).astype(np.float32).astype(ml_dtypes.bfloat16)
    bits = int(found.view(np.uint16)[0])
    near = [np.uint16(bits + step).view(ml_dtypes.bfloat16) for step in (-1, 0, 1)]
    ranked = [(abs(Fraction(float(n)) - Fraction(value)), int(n.view(np.uint16)) & 1, float(n)) for n in near]
    return min(ranked)[2]


def test_casts_round_once(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    arrays = write_model(tmp_path / "wide", config, "base", seed)
    steps = (2**-40, -(2**-40), 0, 2 * 2**-8, 2 * 2**-8 - 2**-50)
    ties = np.array([sign * (1 + 2**-8 + step) for step in steps for sign in (1, -1)])
    arrays["wte.weight"].reshape(-1)[: len(ties)] = ties
    rows = [(w, np.dtype(np.float64), lambda w=w: arrays[w.name]) for w in table(config, "base")]
    write_weights(tmp_path / "wide", rows, "base")
    for dtype in ("bfloat16", "float16", "float32"):
        report = conversion.convert(tmp_path / "wide", tmp_path / dtype, dtype=dtype)
        assert set(report.cast.values()) == {f"float64 to {dtype}"} and len(report.cast) == len(arrays)
        for name, array in conversion.open(tmp_path / dtype).items():
            assert array.dtype == DTYPES[dtype]
            if dtype == "bfloat16":
                expected = np.array([exact(value) for value in arrays[name].reshape(-1).tolist()])
                assert np.array_equal(array.reshape(-1).astype(np.float64), expected), name
            else:
                assert np.array_equal(array, arrays[name].astype(dtype))
    for dtype in ("bfloat16", "float16"):
        conversion.convert(tmp_path / "float32", tmp_path / f"float32 {dtype}", dtype=dtype)
        for name, array in conversion.open(tmp_path / f"float32 {dtype}").items():
            assert np.array_equal(array, arrays[name].astype(np.float32).astype(DTYPES[dtype]))


def test_nothing_of_a_framework_is_loaded():
    code = "import sys, gpt2_multi_conversion as c; c.open(sys.argv[1]); print(*(m.split('.')[0] for m in sys.modules))"
    call = [sys.executable, "-W", "error", "-c", code, str(fixtures.folder("lm"))]
    run = subprocess.run(call, capture_output=True, text=True, check=True)
    assert not {"torch", "tensorflow", "keras", "jax", "flax", "transformers"} & set(run.stdout.split())


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    for path in (tmp_path / "none", tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(CheckpointError, match=r"no such file or folder|expected the weights of a GPT-2"):
            conversion.open(path)
