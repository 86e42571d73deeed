"""What callers bring to a compiled loop: it is found again, never stale, and a part of their own compiled functions."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp

from gpt2_multi.errors import InputError
from gpt2_multi.flax import FlaxGPT2LMHeadModel
from gpt2_multi.flax.generation import decoders
from gpt2_multi.model.config import GPT2Config

jax.config.update("jax_enable_x64", True)  # for float64; everything else has its dtype
SMALL = GPT2Config(
    vocab_size=20, n_positions=40, n_embd=12, n_layer=1, n_head=2, initializer_range=0.5,
    eos_token_id=None, bos_token_id=0,
)  # fmt: skip
IDS = np.array([[3, 1, 4, 1, 5]])
OPTIONS = {"max_new_tokens": 6}


class Counted(FlaxGPT2LMHeadModel):
    """A model that counts how often it is run, whatever is traced."""

    runs = 0

    def __call__(self, *args, **inputs):
        jax.debug.callback(self.count)
        return super().__call__(*args, **inputs)

    def count(self):
        self.runs += 1


@pytest.fixture(scope="module")
def model():
    return FlaxGPT2LMHeadModel(SMALL, seed=3, param_dtype="float64")


def new(model, **given):
    return np.asarray(model.generate(IDS, **{**OPTIONS, **given}))[0, 5:].tolist()


def only(token):
    """A processor that leaves one token."""
    return lambda ids, logits, length: jnp.where(jnp.arange(20) == token, logits, -jnp.inf)


def test_the_same_functions_are_traced_once_and_others_anew(model, monkeypatch):
    fresh, four = FlaxGPT2LMHeadModel(SMALL, seed=3), only(4)
    for given in ({"logits_processor": four}, {"logits_processor": [four]}, {"logits_processor": four, "top_k": 3}):
        assert new(fresh, do_sample=True, **given) == [4] * 6
    assert fresh.decoders.decode._cache_size() == 1
    assert new(fresh, logits_processor=only(7)) == [7] * 6 and new(fresh) == new(fresh, logits_processor=[])
    assert fresh.decoders.decode._cache_size() == 3
    monkeypatch.setattr(decoders, "MOST", 2)
    compiled = fresh.decoders
    assert new(fresh, logits_processor=only(9)) == [9] * 6 and fresh.decoders is not compiled  # no more are kept


def test_functions_may_ask_python(model):
    """By `jax.pure_callback`, which is given the ids: what a constraint that is no array needs."""

    def after(ids):
        return (np.arange(20) == (ids[:, None] + 1) % 20).astype(np.float64) * 1e3

    def processor(ids, logits, length):
        last = jax.lax.dynamic_slice_in_dim(ids, length - 1, 1, 1)[:, 0]
        shape = jax.ShapeDtypeStruct(logits.shape, jnp.float64)
        return logits + jax.pure_callback(after, shape, last)

    assert new(model, logits_processor=processor) == [6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"logits_processor": lambda ids, logits, length: logits[0]}, r"logits_processor: expected shape \(1, 20\)"),
        ({"stopping_criteria": lambda ids, logits, length: ids > 3}, r"stopping_criteria: expected shape \(1\)?,"),
        ({"prefix_allowed_tokens_fn": lambda prompt, ids, length: [1, 2]}, r"expected booleans \(20,\), found int64"),
    ],
)
def test_functions_that_give_something_else_are_one_sentence(model, given, sentence):
    with pytest.raises(InputError, match=sentence):
        new(model, **given)


def test_a_function_of_the_user_has_all_of_it_within(model):
    negative, types = np.array([[2, 2]]), np.array([[1, 1, 2, 2, 2]])
    embeds = model.params["transformer"]["wte"]["embedding"][IDS]
    cache = model(IDS[:, :3], past_key_values=model.init_cache(1, 8)).past_key_values
    for given in (
        {"logits_processor": only(4)},
        {"guidance_scale": 1.5, "negative_prompt_ids": negative},
        {"token_type_ids": types},
        {"past_key_values": cache},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ):
        expected = model.generate(IDS, **OPTIONS, **given)
        found = jax.jit(lambda params, given=given: model.generate(IDS, params=params, **OPTIONS, **given))(
            model.params
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9, strict=True)

    @jax.jit
    def traced(embeds, ids, negative):
        led = {"guidance_scale": 1.5, "negative_prompt_ids": negative}
        return model.generate(inputs_embeds=embeds, **OPTIONS), model.generate(ids, **led, **OPTIONS)

    ours, led = traced(embeds, IDS, negative)
    assert ours[0].tolist() == new(model)
    assert led[0, 5:].tolist() == new(model, guidance_scale=1.5, negative_prompt_ids=negative)
    with pytest.raises(InputError, match="past_key_values: its length is not known while it is traced"):
        jax.jit(lambda cache: model.generate(IDS, past_key_values=cache, **OPTIONS))(cache)


def test_an_assistant_saves_runs_and_is_no_part_of_what_is_compiled(model):
    counted = Counted(SMALL, _do_init=False, param_dtype="float64")
    counted.params = model.params
    free, alike = new(counted, max_new_tokens=12), {"assistant_model": model, "num_assistant_tokens": 3}
    jax.effects_barrier()
    alone, counted.runs = counted.runs, 0
    assert new(counted, max_new_tokens=12, **alike) == free
    jax.effects_barrier()
    assert (alone, counted.runs) == (13, 4)  # the prompt, and three guesses with one token each time
    sizes = []
    for seed in (3, 4, 5):
        other = FlaxGPT2LMHeadModel(SMALL, seed=seed, param_dtype="float64")
        assert new(model, assistant_model=other, num_assistant_tokens=4) == new(model)
        sizes.append(model.decoders.decode._cache_size())
    assert len(set(sizes)) == 1
