"""The recorded language model, on which most of what is generated here is generated, once in each dtype."""

import functools

import pytest

from tests.support import fixtures
from tests.support.effort import THOROUGH

# Each dtype and each compiler; all four pairs where everything is tried.
WAYS = [("float32", "xla"), ("float64", "graph"), *([("float32", "graph"), ("float64", "xla")] if THOROUGH else [])]


@functools.cache
def recorded_in(dtype):
    """The model in a dtype; what it compiles is compiled once."""
    from gpt2_multi.tf import TFGPT2LMHeadModel

    return TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype=dtype)


@pytest.fixture(scope="module", params=WAYS, ids=" ".join)
def way(request):
    """A dtype, and what compiles the loop."""
    return request.param


@pytest.fixture
def model(way):
    """The model in the way's dtype."""
    return recorded_in(way[0])


@pytest.fixture
def jit(way):
    """Whether XLA compiles the loop."""
    return way[1] == "xla"


@pytest.fixture
def usual():
    """The model as it is by default, for what neither a dtype nor a compiler changes."""
    return recorded_in("float32")


@pytest.fixture
def exact():
    """The model in float64, likewise."""
    return recorded_in("float64")


@pytest.fixture
def eager():
    """Run what tf.function decorates without tracing it."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)
