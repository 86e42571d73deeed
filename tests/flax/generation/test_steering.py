"""Whoever changes what a call of the model gives changes what it generates: no loop goes past `model(...)`."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nn = pytest.importorskip("flax.linen")

from gpt2_multi.flax import FlaxGPT2LMHeadModel, GPT2LMHeadModule, GPT2Module
from gpt2_multi.flax.loading import FlaxGPT2PreTrainedModel
from gpt2_multi.flax.model import MLP
from gpt2_multi.model.config import GPT2Config
from tests.support import plain_loop
from tests.support.effort import THOROUGH
from tests.support.generation_cases import tokenizer
from tests.support.plain_loop import WAYS

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
SMALL = GPT2Config(
    vocab_size=294, n_positions=12, n_embd=12, n_layer=1, n_head=3, initializer_range=0.5,
    eos_token_id=None, bos_token_id=0,
)  # fmt: skip
PROMPT = [5, 9, 11, 5, 9]
BIAS = 4 * np.cos(1.7 * np.arange(294))


class Called(FlaxGPT2LMHeadModel):
    """A model whose call adds something to the logits."""

    strength = 1.0

    def __call__(self, *args, **inputs):
        output = super().__call__(*args, **inputs)
        return replace(output, logits=output.logits + self.strength * BIAS)


class LMHead(GPT2LMHeadModule):
    """A head of another temper."""

    @nn.compact
    def __call__(self, *args, **inputs):
        output = super().__call__(*args, **inputs)
        return replace(output, logits=output.logits + BIAS)


class Body(GPT2Module):
    """A body that turns around what it found."""

    def __call__(self, *args, **inputs):
        output = super().__call__(*args, **inputs)
        return replace(output, last_hidden_state=-output.last_hidden_state)


class WithBody(GPT2LMHeadModule):
    """The usual head on another body."""

    def body(self):
        return Body(self.config, self.dtype, self.param_dtype, name="transformer")


class WithHead(FlaxGPT2LMHeadModel):
    module_class = LMHead


class WithInner(FlaxGPT2LMHeadModel):
    module_class = WithBody


def contrary(call, args, inputs, context):
    """Linen's interceptor: an MLP that says the opposite."""
    output = call(*args, **inputs)
    return -output if isinstance(context.module, MLP) and context.method_name == "__call__" else output


def backwards(self, *args, **inputs):
    """A call in the place of the class's own, that likes what it did not like."""
    output = FlaxGPT2PreTrainedModel.__call__(self, *args, **inputs)
    return replace(output, logits=-output.logits)


STEERED = {
    "an overridden call": (Called, nullcontext),
    "another module": (WithHead, nullcontext),
    "another inner module": (WithInner, nullcontext),
    "intercepted methods": (FlaxGPT2LMHeadModel, lambda: nn.intercept_methods(contrary)),
}


@pytest.fixture(scope="module")
def plain():
    return FlaxGPT2LMHeadModel(SMALL, seed=3, param_dtype="float64")


@pytest.fixture(scope="module")
def unsteered(plain):
    """What the plain model generates, each way."""
    return {way: generated(plain, options) for way, options in WAYS.items()}


@pytest.fixture(params=STEERED)
def steered(request, plain):
    """A model with the plain one's parameters, steered while the test runs."""
    cls, context = STEERED[request.param]
    model = cls(SMALL.replace(), _do_init=False, param_dtype="float64")
    model.params = plain.params
    with context():
        yield model


def expected(model, options):
    """The tokens of a loop over calls of the model, without a cache."""

    def logits_of(ids):
        row, mask = np.zeros((2, 1, 12), int)
        row[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        return model(row, attention_mask=mask).logits[0, len(ids) - 1]

    return plain_loop.plain(logits_of, SMALL, [PROMPT], **options).tolist()


def generated(model, options):
    found = model.generate(np.array([PROMPT]), **{"max_new_tokens": 6} | options)
    return np.asarray(found)[:, len(PROMPT) :].tolist()


# Every way to choose tokens sees an overridden call, which is outermost, and one of the changes further inside.
SEEN = [
    [way for at, way in enumerate(WAYS) if THOROUGH or not number or (at - 2 * number) % len(WAYS) < 2]
    for number in range(len(STEERED))
]


@pytest.mark.parametrize(("steered", "ways"), list(zip(STEERED, SEEN, strict=True)), ids=STEERED, indirect=["steered"])
def test_every_way_to_generate_is_steered(unsteered, steered, ways):
    for way in ways:
        assert generated(steered, WAYS[way]) == expected(steered, WAYS[way]) != unsteered[way], way


def test_streams_are_steered(steered):
    for options in ({}, WAYS["sliding"], WAYS["lookup"]):
        columns = steered.stream_tokens(np.array([PROMPT]), **{"max_new_tokens": 6} | options)
        assert [[int(column[0]) for column in columns]] == expected(steered, options)
    words = tokenizer()
    options = {"tokenizer": words, "max_new_tokens": 5}
    assert "".join(steered.stream("the", **options)) == steered.generate("the", **options)[3:]


def test_what_is_changed_after_the_first_call_takes_effect(plain, monkeypatch):
    """Nothing that was compiled before is used again: neither for an attribute, nor a class, nor a module."""
    model = Called(SMALL.replace(), _do_init=False, param_dtype="float64")
    model.params, before = plain.params, generated(plain, {})
    for strength in (0, 1, -1):
        model.strength = strength
        assert generated(model, {}) == expected(model, {})
    with nn.intercept_methods(contrary):
        assert generated(plain, {}) == expected(plain, {}) != before
    assert generated(plain, {}) == before
    monkeypatch.setattr(FlaxGPT2LMHeadModel, "__call__", backwards, raising=False)
    assert generated(plain, {}) == expected(plain, {}) != before


def test_an_interceptor_that_changes_is_looked_at_again(plain):
    volume = [1.0]

    def changed(call, args, inputs, context):
        output = call(*args, **inputs)
        return volume[0] * output if isinstance(context.module, MLP) else output

    found = []
    with nn.intercept_methods(changed):
        for volume[0] in (1.0, -1.0):
            found.append(generated(plain, {}))
            assert found[-1] == expected(plain, {})
    assert found[0] == generated(plain, {}) != found[1]


def test_a_stream_does_not_leave_a_steered_loop_behind(plain):
    model = FlaxGPT2LMHeadModel(SMALL.replace(), _do_init=False, param_dtype="float64")
    model.params = plain.params
    stream = model.stream_tokens(np.array([PROMPT]), max_new_tokens=6)
    with nn.intercept_methods(contrary):
        list(stream)
    assert generated(model, {}) == generated(plain, {})


def test_a_jit_of_the_user_is_steered(plain):
    model = Called(SMALL.replace(), _do_init=False, param_dtype="float64")
    ids = np.array([PROMPT])
    outer = jax.jit(lambda params: model.generate(ids, params=params, max_new_tokens=6))
    model.params = plain.params
    assert np.asarray(outer(plain.params))[:, len(PROMPT) :].tolist() == expected(model, {})
