"""The drop-in classes inside functions that JAX transforms: symbolic sizes, gradients of each row, shapes alone."""

import pytest

jax = pytest.importorskip("jax")

import numpy as np
from jax import export

from gpt2_multi import flax
from gpt2_multi.model.config import GPT2Config

CONFIG = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=4, eos_token_id=None, pad_token_id=0)
IDS = np.random.RandomState(0).randint(1, 50, (3, 6)).astype("int32")
MASK = np.array([[1] * 4 + [0] * 2, [0] * 2 + [1] * 4, [1] * 6], "int32")
CHOICES = [np.stack([x, x], 1) for x in (IDS, MASK)]
HEADS = [
    (flax.FlaxGPT2LMHeadModel, [IDS, MASK], IDS),
    (flax.FlaxGPT2DoubleHeadsModel, CHOICES, CHOICES[0]),
    (flax.FlaxGPT2ForSequenceClassification, [IDS, MASK], np.array([0, 1, 1])),
]
heads = pytest.mark.parametrize(("cls", "given", "labels"), HEADS, ids=[cls.__name__ for cls, *_ in HEADS])


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@heads
def test_an_export_takes_any_batch_and_any_length(cls, given, labels):
    model = cls(CONFIG)
    rows, length = export.symbolic_shape("rows, length")
    free = [jax.ShapeDtypeStruct((rows, *x.shape[1:-1], length), x.dtype) for x in given]

    def logits(params, ids, mask):
        return model(ids, attention_mask=mask, params=params).logits

    exported = export.deserialize(export.export(jax.jit(logits))(shapes(model.params), *free).serialize())
    for parts in (given, [np.concatenate([x[:1], x[:1]], -1) for x in given]):
        np.testing.assert_allclose(
            exported.call(model.params, *parts), logits(model.params, *parts), atol=1e-5, rtol=1e-4
        )


def test_an_export_without_a_mask_finds_the_last_token_by_the_padding():
    model = flax.FlaxGPT2ForSequenceClassification(CONFIG)
    sizes = export.symbolic_shape("rows, length")
    exported = export.export(jax.jit(lambda params, ids: model(ids, params=params).logits))(
        shapes(model.params), jax.ShapeDtypeStruct(sizes, IDS.dtype)
    )
    np.testing.assert_allclose(exported.call(model.params, IDS), model(IDS).logits, atol=1e-5, rtol=1e-4)


@heads
def test_gradients_of_each_row_are_those_of_the_row_alone(cls, given, labels):
    model = cls(CONFIG)

    def loss(params, ids, mask, labels):
        return model(ids[None], attention_mask=mask[None], labels=labels[None], params=params).loss

    every = jax.vmap(jax.grad(loss), (None, 0, 0, 0))(model.params, *given, labels)
    alone = jax.grad(loss)(model.params, *(x[1] for x in (*given, labels)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y, atol=1e-4, rtol=1e-3), every, alone)


def test_models_say_how_many_parameters_they_have_and_where_they_come_from():
    model = flax.FlaxGPT2LMHeadModel.from_pretrained("demo")
    assert model.num_parameters() == sum(x.size for x in jax.tree.leaves(model.params))
    assert (model.name_or_path, model.base_model_prefix, model.can_generate()) == ("demo", "transformer", True)
