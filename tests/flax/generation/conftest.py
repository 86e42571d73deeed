"""The recorded language model, on which most of what is generated here is generated, once in each dtype."""

import functools

import pytest

from tests.support import fixtures


@functools.cache
def recorded_in(dtype):
    """The model in a dtype; what it compiles is compiled once."""
    from gpt2_multi.flax import FlaxGPT2LMHeadModel

    return FlaxGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype=dtype)


@pytest.fixture(scope="module", params=["float32", "float64"])
def model(request):
    """The model in each dtype."""
    return recorded_in(request.param)


@pytest.fixture
def exact():
    """The model in float64, for what a dtype does not change."""
    return recorded_in("float64")
