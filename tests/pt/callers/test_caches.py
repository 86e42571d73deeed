"""Caches of transformers in our models: extended in place and given back, as its own models do."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gpt2_multi import pt
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config

SHAPE = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
SMALL = GPT2Config(**SHAPE, eos_token_id=None, pad_token_id=0, initializer_range=0.3)
THEIRS = transformers.GPT2Config(**SHAPE, bos_token_id=None, eos_token_id=None)
IDS = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(0))
CACHES = {
    "dynamic": transformers.DynamicCache,
    "dynamic, with its layers": lambda: transformers.DynamicCache(config=THEIRS),
    "static": lambda: transformers.StaticCache(config=THEIRS, max_cache_len=10),
    "of two parts": lambda: transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache()),
}


class Old:
    """A cache of transformers before 4.54: lists of keys and of values."""

    def __init__(self):
        self.key_cache, self.value_cache = [], []

    def get_seq_length(self, layer=0):
        return self.key_cache[0].shape[2] if self.key_cache else 0

    def update(self, key, value, layer, places=None):
        if layer < len(self.key_cache):
            key = torch.cat([self.key_cache[layer], key], 2)
            value = torch.cat([self.value_cache[layer], value], 2)
        self.key_cache[layer : layer + 1], self.value_cache[layer : layer + 1] = [key], [value]
        return key, value


@pytest.mark.parametrize("make", [*CACHES.values(), Old], ids=[*CACHES, "of lists"])
@pytest.mark.parametrize("head", [pt.GPT2Model, pt.GPT2LMHeadModel, pt.GPT2ForSequenceClassification])
def test_a_text_read_in_two_parts_is_the_text(make, head):
    """Whoever calls may go by the cache that was given, or by the one that comes back: it is the same."""
    torch.manual_seed(0)
    model, cache = head(SMALL).eval(), make()
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    first = model(IDS[:, :4], past_key_values=cache, attention_mask=mask[:, :4])
    assert first.past_key_values is cache and int(cache.get_seq_length()) == 4
    found = model(IDS[:, 4:], past_key_values=cache, attention_mask=mask)[0]
    expected = model(IDS, attention_mask=mask)[0]
    assert torch.allclose(found, expected[:, 4:] if expected.dim() == 3 else expected, atol=1e-5)
    assert int(cache.get_seq_length()) == 6


def test_the_encoder_s_keys_are_kept_and_used():
    torch.manual_seed(0)
    model, states = pt.GPT2LMHeadModel(SMALL.replace(add_cross_attention=True)).eval(), torch.randn(2, 3, 16)
    cache = CACHES["of two parts"]()
    model(IDS[:, :4], past_key_values=cache, encoder_hidden_states=states)
    assert cache.is_updated == {0: True, 1: True}
    found = model(IDS[:, 4:], past_key_values=cache, encoder_hidden_states=torch.zeros_like(states)).logits
    expected = model(IDS, encoder_hidden_states=states).logits[:, 4:]
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_reach_a_given_past():
    model, shape = pt.GPT2LMHeadModel(SMALL), (2, 4, 3, 4)
    pairs = [(torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)) for _ in range(2)]
    model(IDS, past_key_values=transformers.DynamicCache(pairs), labels=IDS).loss.backward()
    assert all(x.grad.abs().sum() > 0 for pair in pairs for x in pair)


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_generation_goes_on_from_a_cache_and_fills_it(name):
    """As in a chat, whose program keeps the cache and never looks at what `generate` returns beside the tokens."""
    torch.manual_seed(0)
    model, cache = pt.GPT2LMHeadModel(SMALL).eval(), CACHES[name]()
    first = model.generate(IDS[:, :3], past_key_values=cache, max_new_tokens=3)
    assert torch.equal(first, model.generate(IDS[:, :3], max_new_tokens=3)) and int(cache.get_seq_length()) == 5
    calls = []
    model.register_forward_pre_hook(lambda module, given: calls.append(given[0].shape[1]))
    second = model.generate(first, past_key_values=cache, max_new_tokens=2)
    assert calls == [1, 1] and int(cache.get_seq_length()) == 7
    assert torch.equal(second, model.generate(IDS[:, :3], max_new_tokens=5))


def test_a_cache_that_does_not_fit_is_one_sentence():
    model = pt.GPT2LMHeadModel(SMALL).eval()
    static = transformers.StaticCache(config=THEIRS, max_cache_len=5)
    with pytest.raises(InputError, match="0 cached and 6 new tokens are more than the cache's max_length 5"):
        model(IDS, past_key_values=static)
    cache = model(IDS, past_key_values=transformers.DynamicCache()).past_key_values
    with pytest.raises(InputError, match="made for 2 rows"):
        model(IDS[:1], past_key_values=cache)
    with pytest.raises(InputError, match="pair for each of 3 layers, found DynamicCache"):
        pt.GPT2LMHeadModel(SMALL.replace(n_layer=3))(IDS, past_key_values=cache)


def test_a_cache_made_under_autocast_may_be_passed_back():
    model = pt.GPT2LMHeadModel(SMALL).eval()
    with torch.autocast("cpu", torch.bfloat16):
        past = model(IDS[:, :4]).past_key_values
        assert past[0][0].dtype == torch.bfloat16
        found = model(IDS[:, 4:], past_key_values=past).logits
        assert torch.allclose(found, model(IDS).logits[:, 4:], atol=0.1)


def test_a_loop_of_somebody_else_is_given_what_it_hands_on():
    """As captum's and others' are written: with the model's own calls, and `cache_position`."""
    model = pt.GPT2LMHeadModel.from_pretrained("demo")
    ids = torch.tensor([[5, 9, 7]])
    given = {"attention_mask": torch.ones_like(ids), "cache_position": torch.arange(3), "use_cache": True}
    expected = model.generate(ids, max_new_tokens=4)
    for _ in range(4):
        output = model(**model.prepare_inputs_for_generation(ids, **given))
        given = model._update_model_kwargs_for_generation(output, given)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, expected) and given["attention_mask"].shape == (1, 7)
    with pytest.raises(InputError, match="cache_position: expected 6 to 6, since tokens are written after"):
        model(ids[:, -1:], past_key_values=output.past_key_values, cache_position=torch.tensor([9]))


def written(model, ids):
    """A cache of `init_cache`, with room for more than the text."""
    cache = model.init_cache(len(ids), 12)
    return model(ids, past_key_values=cache).past_key_values


@pytest.mark.parametrize("read", [lambda model, ids: model(ids).past_key_values, written], ids=["grows", "has room"])
def test_one_prefix_is_read_once_for_many_suffixes(read):
    """Cut, repeated, chosen and reordered in place, as transformers' DynamicCache: each row is what it is alone."""
    torch.manual_seed(0)
    model = pt.GPT2LMHeadModel(SMALL).eval()
    ours, theirs = read(model, IDS), transformers.DynamicCache()
    model(IDS, past_key_values=theirs)
    ours.crop(5)
    ours.crop(-1)
    theirs.crop(-2)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert len(ours) == len(theirs) == 2 and ours.get_seq_length(1) == theirs.get_seq_length(1) == 4
    assert ours.get_max_cache_shape() == (-1 if ours.capacity is None else 12)
    for pair, layer in zip(ours, theirs.layers, strict=True):
        assert torch.equal(pair[0], layer.keys) and torch.equal(pair[1], layer.values)
    rows, suffix = IDS[[1, 0, 1], :4], torch.tensor([[7, 8], [9, 4], [3, 2]])
    expected = model(torch.cat([rows, suffix], 1)).logits[:, 4:]
    assert torch.allclose(model(suffix, past_key_values=ours).logits, expected, atol=1e-5)


def test_a_cut_of_nothing_has_two_meanings_and_is_refused():
    cache = pt.GPT2LMHeadModel(SMALL).eval()(IDS).past_key_values
    with pytest.raises(InputError, match=r"crop: expected a length to keep, .*, found 0; leave it out"):
        cache.crop(0)
    cache.crop(99)
    assert cache.get_seq_length() == 6
    cache.crop(-99)
    assert cache.get_seq_length() == 0 and torch.equal(cache[0][0], cache[0][0][:, :, :0])


def test_the_encoder_s_keys_follow_the_rows():
    torch.manual_seed(0)
    model, states = pt.GPT2LMHeadModel(SMALL.replace(add_cross_attention=True)).eval(), torch.randn(2, 3, 16)
    cache = model(IDS[:, :4], encoder_hidden_states=states).past_key_values
    cache.batch_select_indices(torch.tensor([False, True]))
    found = model(IDS[1:, 4:], past_key_values=cache, encoder_hidden_states=torch.zeros(1, 3, 16)).logits
    expected = model(IDS[1:], encoder_hidden_states=states[1:]).logits[:, 4:]
    assert torch.allclose(found, expected, atol=1e-5)
