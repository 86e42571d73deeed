"""Generation calls the model as everybody does: what changes a call changes every text, also after the first one."""

import functools
import inspect

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi.generation.rules import gumbel, window_start
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tf import TFGPT2LMHeadModel, TFGPT2Model
from gpt2_multi.tf.attention import Attention
from gpt2_multi.tf.generation.decoders import Decoders, has_own_attention
from tests.support import generation_cases as cases
from tests.support.effort import THOROUGH

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras, with NumPy 2

SMALL = GPT2Config(
    vocab_size=40, n_positions=24, n_embd=12, n_layer=2, n_head=3, eos_token_id=None, initializer_range=0.6
)
IDS, NEW, LIKED = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]]), 8, 17
GRAPH = {"max_new_tokens": NEW, "jit_compile": False}
BIAS = tf.one_hot(LIKED, 40, 3.0)


class Liking(TFGPT2LMHeadModel):
    """A subclass whose logits say that it likes a token."""

    def call(self, input_ids=None, **given):
        output = super().call(input_ids, **given)
        output.logits += tf.cast(BIAS, output.logits.dtype)
        return output


class Turned(TFGPT2Model):
    """A subclass of the inner model, whose hidden states have another order."""

    def call(self, input_ids=None, *given, **named):
        output = super().call(input_ids, *given, **named)
        output.last_hidden_state = output.last_hidden_state[..., ::-1]
        return output


def new(cls=TFGPT2LMHeadModel):
    keras.utils.set_random_seed(0)
    return cls(SMALL.replace(), param_dtype="float64")


def likes(model):
    """An instance's own call."""
    call = model.call

    def liking(input_ids=None, **given):
        output = call(input_ids, **given)
        output.logits += tf.cast(BIAS, output.logits.dtype)
        return output

    model.call = liking


def turns(model):
    """A call of the inner model's own."""
    call = model.transformer.call

    def turned(*given, **named):
        output = call(*given, **named)
        output.last_hidden_state = output.last_hidden_state[..., ::-1]
        return output

    model.transformer.call = turned


def replaces(model):
    """Another inner model."""
    weights = model.transformer.get_weights()
    model.transformer = Turned(model.config, dtype=model.dtype_policy, name="transformer")
    model.transformer.set_weights(weights)


def adapts(model):
    """LoRA, whose update is not zero."""
    for block in model.transformer.h:
        block.attn.c_attn.enable_lora(2)
        block.attn.c_attn.lora_kernel_b.assign(tf.ones_like(block.attn.c_attn.lora_kernel_b))


def silences(model):
    """A block deep inside, with a call of its own."""
    model.transformer.h[1].mlp.call = lambda x: tf.zeros_like(x)


CHANGES = [None, likes, turns, replaces, adapts, silences]


def logits_of(model, rows):
    """The logits after rows of ids of one length, from a call without a cache."""
    return model(np.array(rows), use_cache=False).logits[:, -1].numpy()


def greedy(model, count=NEW):
    """A plain loop over `model(...)`, whose window slides where the text is longer than the context."""
    rows = IDS
    for _ in range(count):
        logits = logits_of(model, rows[:, window_start(rows.shape[1], 24) :])
        rows = np.concatenate([rows, logits.argmax(-1)[:, None]], 1)
    return rows.tolist()


def sampled(model):
    """The same with noise, of which each row has its own stream."""
    rows = IDS
    for step in range(NEW):
        noise = [gumbel(4 + row, 0, step, np.arange(40)) for row in range(len(rows))]
        rows = np.concatenate([rows, (logits_of(model, rows) + noise).argmax(-1)[:, None]], 1)
    return rows.tolist()


def beamed(model, beams=2):
    """Beam search without an end token: the likeliest paths go on."""
    searches = [[(0.0, row)] for row in IDS.tolist()]
    for _ in range(NEW):
        logits = iter(logits_of(model, [path for paths in searches for _, path in paths]))
        searches = [best([(s, p, next(logits)) for s, p in paths], beams) for paths in searches]
    return [paths[0][1] for paths in searches]


def best(paths, beams):
    """The likeliest continuations of paths by one token: a sum of log probabilities and ids each."""
    steps = [(s + v - np.logaddexp.reduce(x), [*p, t]) for s, p, x in paths for t, v in enumerate(x)]
    return sorted(steps, key=lambda step: -step[0])[:beams]


WAYS = {  # options, and the texts that `generate` should give
    "greedy": ({}, greedy),
    "sampled": ({"do_sample": True, "top_k": 0, "seed": 4}, sampled),
    "beams": ({"num_beams": 2}, beamed),
    "lookup": ({"prompt_lookup_num_tokens": 3}, greedy),
    "sliding": ({"sliding_window": True, "max_new_tokens": 24}, lambda model: greedy(model, count=24)),
}


@pytest.fixture(scope="module")
def plain():
    """What a model without a change makes, by the way."""
    model = new()
    return {way: model.generate(IDS, **GRAPH | options).numpy() for way, (options, _) in WAYS.items()}


# Every way to choose tokens sees what a subclass changes, which is outermost, and two of what is further inside; every
# change is seen by two ways, and by the streams of both. All pairs where everything is tried.
SEEN = [
    (change, way)
    for number, change in enumerate(CHANGES)
    for at, way in enumerate(WAYS)
    if THOROUGH or not change or (at - number) % len(WAYS) < 2
]


@pytest.mark.parametrize(("change", "way"), SEEN, ids=lambda value: getattr(value, "__name__", value or "subclass"))
def test_what_steers_a_call_steers_generation(change, way, plain):
    model, options = new(TFGPT2LMHeadModel if change else Liking), GRAPH | WAYS[way][0]
    if change:
        if way == "greedy":  # so that there is something compiled to be stale
            assert np.array_equal(model.generate(IDS, **options), plain[way])
        change(model)
    found = model.generate(IDS, **options).numpy()
    assert found.tolist() == WAYS[way][1](model) and not np.array_equal(found, plain[way])
    if way != "beams":
        assert np.array_equal(tf.stack(list(model.stream_tokens(IDS, **options)), 1), found[:, 7:])


@pytest.mark.parametrize("jit", [True, False])
def test_a_call_that_is_changed_back_gives_the_old_text(jit):
    model, options = new(), GRAPH | {"jit_compile": jit}
    before = model.generate(IDS, **options).numpy()
    likes(model)
    assert model.generate(IDS, **options).numpy().tolist() == greedy(model)
    del model.call
    assert np.array_equal(model.generate(IDS, **options), before)


def test_a_class_that_is_changed_is_seen(monkeypatch):
    model, call = new(), TFGPT2LMHeadModel.call
    before = model.generate(IDS, **GRAPH).numpy()

    def liking(self, input_ids=None, **given):
        output = call(self, input_ids, **given)
        output.logits += tf.cast(BIAS, output.logits.dtype)
        return output

    monkeypatch.setattr(TFGPT2LMHeadModel, "call", liking)
    found = model.generate(IDS, **GRAPH).numpy()
    assert found.tolist() == greedy(model) and not np.array_equal(found, before)


def test_settings_and_methods_that_are_changed_are_seen():
    model = new()
    block, layer = model.transformer.h[0], model.transformer.h[1].mlp.c_fc
    attend, before = block.attn.attend, model.generate(IDS, **GRAPH).numpy()
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(tf.ones_like(layer.lora_kernel_b))
    kept = Decoders.of(model, False)
    for change in (
        lambda: setattr(layer, "lora_alpha", 32.0),
        lambda: setattr(block.mlp, "act", tf.nn.relu),
        lambda: setattr(block.ln_1, "epsilon", 3.0),
        lambda: setattr(block.attn, "attend", lambda q, *given: attend(q * -4.0, *given)),
        lambda: setattr(model.config, "reorder_and_upcast_attn", True),
    ):
        assert Decoders.of(model, False) is kept
        change()
        kept, stale = Decoders.of(model, False), kept
        assert kept is not stale
    found = model.generate(IDS, **GRAPH).numpy()
    assert found.tolist() == greedy(model) and not np.array_equal(found, before)


def test_caches_are_flat_where_none_but_our_code_sees_them(monkeypatch):
    assert has_own_attention(new(), None) and has_own_attention(type("Named", (TFGPT2LMHeadModel,), {})(SMALL))
    assert not has_own_attention(new(Liking))
    replaced, turned = new(), new()
    replaces(replaced)
    turned.transformer.h[0].attn.attend = lambda *given: None
    assert not any(map(has_own_attention, (replaced, turned)))
    other = functools.wraps(Attention.call)(lambda self, *given, **named: None)
    monkeypatch.setattr(Attention, "call", other)
    assert not has_own_attention(new())


def test_a_stream_of_text_is_steered(tmp_path):
    cases.write(tmp_path, 1)
    model, tokenizer = TFGPT2LMHeadModel.from_pretrained(tmp_path, param_dtype="float64"), cases.tokenizer()
    options = {"tokenizer": tokenizer, "max_new_tokens": 4, "jit_compile": False, "eos_token_id": None}
    before = "".join(model.stream("the rain", **options))
    call = model.call

    def liking(input_ids=None, **given):
        output = call(input_ids, **given)
        output.logits += 1e3 * tf.one_hot(LIKED, output.logits.shape[-1], dtype=output.logits.dtype)
        return output

    model.call = liking
    found = "".join(model.stream("the rain", **options))
    assert found == tokenizer.decode([LIKED] * 4) != before and model.generate("the rain", **options)[8:] == found


def test_from_generate_to_the_first_product_are_few_frames(monkeypatch):
    model, seen = new(), []
    first, call = model.transformer.h[0].attn.c_attn, keras.layers.Dense.call

    def looked(self, *given, **named):
        if self is first and not seen:
            seen.extend(frame.filename.replace("\\", "/") for frame in inspect.stack(0))
        return call(self, *given, **named)

    monkeypatch.setattr(keras.layers.Dense, "call", looked)
    model.generate(IDS, **GRAPH)
    assert 0 < sum("/gpt2_multi/tf/" in name for name in seen) <= 11


def test_a_mask_of_a_whole_cache_is_one_of_what_is_there():
    model, mask = new(), np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    whole = model(IDS, attention_mask=mask).logits
    wide = np.concatenate([mask, np.ones((2, 5), int)], 1)
    cache, parts = model.init_cache(2, 12), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        output = model(IDS[:, part], cache, wide)
        cache, _ = output.past_key_values, parts.append(output.logits)
    np.testing.assert_allclose(np.concatenate(parts, 1)[mask != 0], whole[mask != 0], rtol=0, atol=1e-9)
    step = tf.function(lambda ids, cache: model(ids, cache, wide).logits, jit_compile=True)
    seen = mask[:, :6] != 0
    np.testing.assert_allclose(step(IDS[:, :6], model.init_cache(2, 12))[seen], whole[:, :6][seen], rtol=0, atol=1e-9)
