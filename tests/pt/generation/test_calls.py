"""What only PyTorch has of what a call brings: functions called once a token, transformers' objects, calls counted."""

import copy
import threading

import pytest

torch = pytest.importorskip("torch")

from gpt2_multi import GenerationConfig, GPT2Config, TextIteratorStreamer, TextStreamer
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import DEMO
from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

CONFIG = GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=None, bos_token_id=3)
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = GPT2LMHeadModel(CONFIG).eval()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.3)
    return made


@pytest.fixture(scope="module")
def near(model):
    """A model that chooses nearly the same."""
    made = copy.deepcopy(model)
    made.transformer.h[1].mlp.c_proj.weight.data *= 0.9
    return made


@pytest.fixture(scope="module")
def demo():
    return GPT2LMHeadModel.from_pretrained(DEMO).eval(), GPT2Tokenizer.from_pretrained(DEMO)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"guidance_scale": 1.3}], ids=str)
def test_an_assistant_saves_calls_of_the_model(model, near, options):
    calls, seen = [], []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {"logits_processor": lambda ids, logits: (seen.append(ids.shape[1]), logits)[1], "max_new_tokens": 24}
    plain, alone = model.generate(IDS, **given, **options), len(calls)
    assert torch.equal(model.generate(IDS, assistant_model=near, num_assistant_tokens=4, **given, **options), plain)
    hook.remove()
    assert alone == 24 and len(calls) - alone < 16
    assert seen == [*range(5, 29)] * 2  # a processor with a memory sees each text once, as without an assistant


def test_an_assistant_needs_the_same_words(model):
    other = GPT2LMHeadModel(GPT2Config(**{**CONFIG.to_dict(), "vocab_size": 41}))
    with pytest.raises(
        InputError, match="assistant_model: has 41 tokens where the model has 40; give one of the same tok"
    ):
        model.generate(IDS, assistant_model=other)


def test_a_cache_with_room_is_written_in_place_and_one_that_was_returned_is_not(model):
    cache, whole = model.init_cache(1, 20), model.generate(IDS, max_new_tokens=12)
    first = model.generate(IDS, max_new_tokens=6, past_key_values=cache, return_dict_in_generate=True)
    assert first.past_key_values is cache and cache.length == 10
    assert torch.equal(model.generate(first.sequences, max_new_tokens=6, past_key_values=cache), whole)
    assert cache.length == 16
    with pytest.raises(
        InputError, match="past_key_values: 16 cached and 5 new tokens are more than the cache's max_leng"
    ):
        model.generate(whole, max_new_tokens=5, past_key_values=cache)
    kept = model.generate(IDS, max_new_tokens=6, return_dict_in_generate=True)
    before = [x.clone() for pair in kept.past_key_values for x in pair]
    for past in (kept.past_key_values, tuple(kept.past_key_values)):
        assert torch.equal(model.generate(kept.sequences, max_new_tokens=6, past_key_values=past), whole)
    assert all(map(torch.equal, before, (x for pair in kept.past_key_values for x in pair)))


def test_functions_see_no_ids_where_embeddings_stand_for_them(model):
    seen, embeds = [], model.transformer.wte(IDS).detach()
    given = {"logits_processor": lambda ids, logits: (seen.append(ids.tolist()), logits)[1], "max_new_tokens": 3}
    made = model.generate(inputs_embeds=embeds, **given).tolist()
    assert seen == [[made[0][:count]] for count in range(3)]
    assert model.generate(IDS, inputs_embeds=embeds, **given).tolist() == [IDS[0].tolist() + made[0]]
    assert seen[3:] == [[IDS[0].tolist() + made[0][:count]] for count in range(3)]


def test_arguments_stand_where_transformers_has_them(model):
    expected = model.generate(IDS, max_new_tokens=3)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=[])
    assert torch.equal(model.generate(IDS, config), expected)
    assert torch.equal(
        model.generate(inputs=IDS, generation_config=config, synced_gpus=False, use_cache=True), expected
    )
    with pytest.raises(TypeError, match="no option 'logits_procesor'; did you mean 'logits_processor'"):
        model.generate(IDS, logits_procesor=None)
    with pytest.raises(InputError, match=r"logits_processor: expected shape \(1, 40\), found \(\)"):
        model.generate(IDS, logits_processor=lambda ids, logits: None)
    with pytest.raises(
        InputError, match="prefix_allowed_tokens_fn: allows nothing after prompt 0; give one id at least"
    ):
        model.generate(IDS, prefix_allowed_tokens_fn=lambda prompt, ids: [])
    with pytest.raises(InputError, match="streamer: the tokens are given one by one anyway"):
        model.stream_tokens(IDS, streamer=TextStreamer)


def test_texts_take_functions_and_guidance_too(demo):
    model, tokenizer = demo
    never = tokenizer("e").input_ids[0]

    def rule(ids, logits):
        return logits.index_fill(1, torch.tensor([never]), -torch.inf)

    given = {"tokenizer": tokenizer, "max_new_tokens": 20, "logits_processor": rule}
    led = model.generate(["ROMEO:", "What"], negative_prompt_ids=["JULIET:", "No"], guidance_scale=1.5, **given)
    assert led != model.generate(["ROMEO:", "What"], **given)
    pieces = "".join(model.stream("ROMEO:", **given))
    assert "ROMEO:" + pieces == model.generate("ROMEO:", **given)


def test_streamers_give_the_text_and_another_thread_its_end(demo, capsys):
    model, tokenizer = demo
    ids = torch.tensor([tokenizer("ROMEO:").input_ids])
    text = tokenizer.decode(model.generate(ids, max_new_tokens=12, streamer=TextStreamer(tokenizer))[0])
    assert capsys.readouterr().out == text + "\n"
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=600)
    call = {"max_new_tokens": 12, "streamer": pieces}
    threading.Thread(target=model.generate, args=(ids,), kwargs=call).start()
    assert "ROMEO:" + "".join(pieces) == text
    with pytest.raises(ZeroDivisionError):
        model.generate(ids, logits_processor=lambda ids, logits: 1 / 0, streamer=pieces)
    assert "".join(pieces) == ""  # nobody waits for ever


def test_objects_of_transformers_are_functions_and_streamers_too(model, demo):
    transformers = pytest.importorskip("transformers")
    own = transformers.LogitsProcessorList([transformers.MinLengthLogitsProcessor(9, 7, device="cpu")])
    stop = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(8)])
    found = model.generate(IDS, logits_processor=own, stopping_criteria=stop, max_new_tokens=10)
    assert found.shape == (1, 8)
    cache, said = transformers.DynamicCache(), IDS
    for _ in range(3):  # as in a chat
        said = torch.cat([model.generate(said, past_key_values=cache, max_new_tokens=3), IDS[:, :2]], 1)
        assert cache.get_seq_length() == said.shape[1] - 3
    free = IDS
    for _ in range(3):
        free = torch.cat([model.generate(free, max_new_tokens=3), IDS[:, :2]], 1)
    assert torch.equal(said, free)
    got, streamer = [], transformers.TextStreamer(demo[1])
    streamer.on_finalized_text = lambda text, stream_end=False: got.append(text)
    ids = torch.tensor([demo[1]("ROMEO:").input_ids])
    assert demo[1].decode(demo[0].generate(ids, max_new_tokens=8, streamer=streamer)[0]) == "".join(got)
