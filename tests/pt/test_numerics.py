"""The figures of docs/numerics.md: how far dtypes and caches move the logits of PyTorch, relative to the largest."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpt2_multi.pt import GPT2LMHeadModel
from tests.core.parity.test_parity import run_oracle
from tests.support import fixtures

ORACLE_BOUNDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
CACHE_BOUNDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
IDS = fixtures.reference("lm")["in.input_ids"].copy()


@pytest.fixture(params=["sdpa", "eager"])
def load(request):
    """The recorded language model in a dtype, for each way to compute attention."""
    options = {"attn_implementation": request.param}
    return lambda dtype: GPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype=dtype, **options)


def relative(found, expected):
    found, expected = (np.asarray(logits, np.float64) for logits in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("dtype", ORACLE_BOUNDS)
@torch.no_grad()
def test_every_dtype_is_close_to_the_oracle(dtype, load):
    found = relative(load(dtype)(torch.from_numpy(IDS)).logits.double(), run_oracle("lm", {"input_ids": IDS})["logits"])
    print(f"{dtype}: {found:.1e}")
    assert found <= ORACLE_BOUNDS[dtype]


@pytest.mark.parametrize("dtype", CACHE_BOUNDS)
@pytest.mark.parametrize("kind", ["grown", "preallocated"])
@torch.no_grad()
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(dtype, kind, load):
    model, ids, steps = load(dtype), torch.from_numpy(IDS), []
    past = model.init_cache(*ids.shape) if kind == "preallocated" else None
    for step in ids.split(1, 1):
        out = model(step, past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits.double())
    found = relative(torch.cat(steps, 1), model(ids).logits.double())
    print(f"{dtype}, {kind}: {found:.1e}")
    assert found <= CACHE_BOUNDS[dtype]
