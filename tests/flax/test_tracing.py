"""The drop-in classes inside functions that JAX transforms, under its settings: symbolic sizes, rows, shapes alone."""

import pytest

jax = pytest.importorskip("jax")

import numpy as np
from jax import export

from gpt2_multi import flax
from gpt2_multi.model.checkpoint.quantized import with_method
from gpt2_multi.model.config import GPT2Config
from tests.support.effort import THOROUGH

jax.config.update("jax_enable_x64", True)  # with which more dtypes can meet

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


DTYPES = ["bfloat16", *["float16", "float32"] * THOROUGH]  # the first mixes with float32 where anything does
STRICT = CONFIG.replace(n_embd=8, n_head=2, num_labels=3)
SPANS = {"start_positions": np.array([0, 9, 2]), "end_positions": np.array([3, 3, 5])}
LOSSES = [
    *HEADS,
    (flax.FlaxGPT2ForSequenceClassification, [IDS, None], np.ones((3, 3), "float16")),
    (flax.FlaxGPT2ForTokenClassification, [IDS, MASK], IDS % 3),
    (flax.FlaxGPT2ForQuestionAnswering, [IDS, MASK], SPANS),
]
RULES = {
    "greedy": {},
    "sampled": dict(do_sample=True, top_k=5, top_p=0.9, min_p=0.1, typical_p=0.9, temperature=0.7, token_type_ids=IDS),
    "rules": dict(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_length=10,
        bad_words_ids=[[7], [8, 9]],
        sequence_bias={(10,): 2.0, (12, 13): -1.0},
        suppress_tokens=[11],
        eos_token_id=[3, 4],
    ),
    "beams": dict(num_beams=2, do_sample=True, length_penalty=0.7, early_stopping=True, num_return_sequences=2),
    "guided": dict(guidance_scale=1.5, negative_prompt_ids=IDS[:, :3], num_beams=2),
    "functions": dict(
        logits_processor=[lambda ids, logits, length: logits * 2],
        stopping_criteria=[lambda ids, logits, length: ids[:, 0] == 3],
        prefix_allowed_tokens_fn=lambda row, ids, length: jax.numpy.arange(50) > 9,
    ),
    "records": dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_attentions=True),
    "embeddings": dict(inputs_embeds=np.ones((3, 6, 8), "float32")),
}


@pytest.fixture
def strict():
    """No dtype and no rank becomes another by itself, and no tracer leaves its function."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.checking_leaks():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("cls", "given", "labels"), LOSSES)
def test_losses_and_gradients_promote_nothing(cls, given, labels, dtype, strict):
    model = cls(STRICT.replace(pad_token_id=0, problem_type=None), dtype=dtype)
    given = dict(zip(("input_ids", "attention_mask"), given, strict=True))
    if isinstance(labels, dict):
        given |= labels
    else:
        given["labels"] = labels
    if cls is flax.FlaxGPT2DoubleHeadsModel:
        given["mc_labels"] = np.array([0, 1, 0])

    def loss(params):
        output = model(**given, params=params, train=True, dropout_rng=jax.random.key(0))
        return output.loss + getattr(output, "mc_loss", 0)

    jax.eval_shape(jax.grad(loss), model.params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_generation_promotes_nothing(rule, dtype, strict):
    model = flax.FlaxGPT2LMHeadModel(STRICT, dtype=dtype)
    jax.eval_shape(
        lambda params: model.generate(IDS, MASK, params=params, max_new_tokens=3, **RULES[rule]), model.params
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_integers_promote_nothing(rows, strict):
    model = flax.FlaxGPT2LMHeadModel(with_method(STRICT, "int8"), dtype="bfloat16")
    found = jax.eval_shape(lambda params: model(IDS[:rows], params=params).logits, model.params)
    assert found.shape == (rows, 6, STRICT.vocab_size) and found.dtype == "bfloat16"


def test_a_cache_is_made_and_filled_by_each_shard():
    model = flax.FlaxGPT2LMHeadModel(CONFIG)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(params, ids):
        cache = model.init_cache(len(ids), 8)
        cache = model(ids[:, :4], past_key_values=cache, params=params).past_key_values
        return model(ids[:, 4:], past_key_values=cache, params=params).logits

    specs = (jax.P(), jax.P("data")), jax.P("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
    assert jax.eval_shape(mapped, model.params, IDS).shape == (3, 2, 50)


def test_what_cannot_be_traced_promotes_nothing(strict):
    model = flax.FlaxGPT2LMHeadModel(STRICT)
    assert model.generate(IDS[:1], max_new_tokens=3, prompt_lookup_num_tokens=2).shape == (1, 9)
    assert model.generate(IDS[:1], max_new_tokens=3, assistant_model=model).shape == (1, 9)
    state = flax.create_train_state(model, flax.optimizer(flax.cosine_rate(1e-3, 10, 2)))
    state, _ = flax.train_step(state, {"input_ids": IDS[None], "labels": IDS[None]}, micro=True)
    assert flax.eval_step(state, {"input_ids": IDS, "labels": IDS})[1] == 15


def test_models_say_how_many_parameters_they_have_and_where_they_come_from():
    model = flax.FlaxGPT2LMHeadModel.from_pretrained("demo")
    assert model.num_parameters() == sum(x.size for x in jax.tree.leaves(model.params))
    assert (model.name_or_path, model.base_model_prefix, model.can_generate()) == ("demo", "transformer", True)
