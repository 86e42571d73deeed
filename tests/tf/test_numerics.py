"""How far dtypes, caches and XLA move the logits of TensorFlow, relative to the largest."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

from gpt2_multi.tf import TFGPT2LMHeadModel
from tests.core.parity.test_parity import run_oracle
from tests.support import fixtures

BOUNDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}


@pytest.fixture(scope="module")
def ids():
    return fixtures.reference("lm")["in.input_ids"].copy()


def load(dtype):
    """The recorded language model in a dtype, or computing in it by a mixed policy."""
    options = {"dtype": dtype} if "mixed" in dtype else {"param_dtype": dtype}
    return TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), **options)


def relative(found, expected):
    found, expected = (np.asarray(logits, np.float64) for logits in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("dtype", [*BOUNDS, "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("jit", [False, True])
def test_every_dtype_is_close_to_the_oracle(dtype, jit, ids):
    model = load(dtype)
    run = tf.function(lambda ids: model(ids).logits, jit_compile=True) if jit else lambda ids: model(ids).logits
    found = relative(tf.cast(run(ids), tf.float64), run_oracle("lm", {"input_ids": ids})["logits"])
    print(f"{dtype}: {found:.1e}")
    assert found <= BOUNDS[dtype.removeprefix("mixed_")]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", ["grown", "preallocated"])
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(dtype, kind, ids):
    model, steps = load(dtype), []
    past = model.init_cache(*ids.shape) if kind == "preallocated" else None
    for place in range(ids.shape[1]):
        out = model(ids[:, place : place + 1], past, use_cache=True)
        past = out.past_key_values
        steps.append(tf.cast(out.logits, tf.float64))
    found = relative(tf.concat(steps, 1), tf.cast(model(ids).logits, tf.float64))
    print(f"{dtype}, {kind}: {found:.1e}")
    assert found <= BOUNDS[dtype]
