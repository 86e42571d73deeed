"""Whatever changes a call of the model changes generation alike: subclasses, hooks, wrappers, adapters."""

import traceback

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel, GPT2Model
from tests.support.generation_cases import VOCAB, tokenizer
from tests.support.plain_loop import WAYS, plain

CONFIG = GPT2Config(
    vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 8, 9, 8, 9]]
STEPS = {"max_new_tokens": 6, "eos_token_id": None}


def make(cls=GPT2LMHeadModel):
    torch.manual_seed(0)
    return cls(CONFIG, param_dtype="float64").eval()


class Biased(GPT2LMHeadModel):
    """A language model whose own forward adds to the logits."""

    def forward(self, input_ids, **given):
        output = super().forward(input_ids, **given)
        output.logits = output.logits + 2 * torch.cos(torch.arange(VOCAB) * 3.0)
        return output


class Turned(GPT2Model):
    """A body whose own forward changes the hidden states."""

    def forward(self, *given):
        output = super().forward(*given)
        output.last_hidden_state = output.last_hidden_state.roll(1, -1)
        return output


class Wrapped(torch.nn.Module):
    """A module around a body, which has all that it does not have itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *given):
        output = self.inner(*given)
        output.last_hidden_state = -output.last_hidden_state
        return output


def flipped(module, given, output):
    """A hook that turns the logits, or the hidden states, around."""
    if hasattr(output, "logits"):
        output.logits = output.logits.roll(1, -1)
    else:
        output.last_hidden_state = output.last_hidden_state.roll(3, -1)


def steered_block():
    """Activation steering: a vector is added between two blocks."""
    model = make()
    vector = 3.0 * torch.eye(16)[2]
    model.transformer.h[0].register_forward_hook(lambda _m, _i, output: (output[0] + vector, *output[1:]))
    return model


def hooked(part):
    model = make()
    model.get_submodule(part).register_forward_hook(flipped)
    return model


def with_body(wrap):
    model = make()
    model.transformer = wrap(model.transformer)
    return model


def turned(body):
    own = make(Turned)
    own.load_state_dict(body.state_dict())
    return own


def accelerated():
    hooks = pytest.importorskip("accelerate.hooks")

    class Hook(hooks.ModelHook):
        def post_forward(self, module, output):
            output.logits = output.logits.roll(2, -1)
            return output

    return hooks.add_hook_to_module(make(), Hook())


def offloaded():
    return pytest.importorskip("accelerate").cpu_offload(make(), execution_device=torch.device("cpu"))


def adapted():
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    return peft.get_peft_model(make(), options).eval()


MODELS = {
    "a subclass": lambda: make(Biased),
    "a hook": lambda: hooked(""),
    "a hook on the body": lambda: hooked("transformer"),
    "a hook on a block": steered_block,
    "another body": lambda: with_body(turned),
    "a wrapped body": lambda: with_body(Wrapped),
    "accelerate": accelerated,
    "LoRA": adapted,
}


def logits_of(model):
    """The logits after ids, from a call without a cache."""

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].numpy()

    return logits


def generated(model, prompts, **options):
    """The new tokens, of a batch whose shorter prompts are padded."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    given = {} if bool(mask.all()) else {"attention_mask": mask}
    return model.generate(input_ids=ids, **given, **STEPS | options)[:, width:].numpy()


@pytest.mark.filterwarnings("ignore:top_k")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_what_steers_a_call_steers_generation(name, way):
    model, prompts, options = MODELS[name](), PROMPTS, WAYS[way]
    expected = plain(logits_of(model), CONFIG, prompts, **options)
    np.testing.assert_array_equal(generated(model, prompts, **options), expected)
    np.testing.assert_array_equal(generated(model, prompts[:1], **options), expected[: len(expected) // 2])
    if way != "sliding":  # it is steered indeed
        assert (generated(make(), prompts, **options) != expected).any()


@pytest.mark.parametrize("name", MODELS)
def test_what_steers_a_call_steers_streams(name):
    model, prompt = MODELS[name](), tokenizer()("the last of the").input_ids
    expected = plain(logits_of(model), CONFIG, [prompt])[0].tolist()
    columns = model.stream_tokens(torch.tensor([prompt]), **STEPS)
    assert [int(column[0]) for column in columns] == expected
    text = "".join(model.stream("the last of the", tokenizer=tokenizer(), **STEPS))
    assert text == "".join(tokenizer().decode_bytes(expected).decode("utf-8", "replace"))


def test_a_hook_that_comes_later_takes_effect_and_goes_again():
    model = make()
    before = generated(model, PROMPTS)
    hook = model.transformer.register_forward_hook(flipped)
    during = generated(model, PROMPTS)
    np.testing.assert_array_equal(during, plain(logits_of(model), CONFIG, PROMPTS))
    hook.remove()
    assert (during != before).any() and (generated(model, PROMPTS) == before).all()


def test_offloaded_parameters_generate():
    """What accelerate fetches for a layer's call is nowhere in between: the cache is where the layer computes."""
    np.testing.assert_array_equal(generated(offloaded(), PROMPTS), generated(make(), PROMPTS))


def test_sharded_parameters_generate():
    """FSDP gathers parameters before a call, and rebuilds what it is given, a cache included."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for dtype in (torch.float64, torch.float32):
            model, alike = make(), make().to(dtype)
            for part in (*model.transformer.h, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
            for options in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
                np.testing.assert_array_equal(
                    generated(model, PROMPTS, **options), generated(alike, PROMPTS, **options)
                )
    finally:
        destroy_process_group()


def test_every_token_is_one_call_without_a_mask_and_with_a_cache():
    """So that wrappers see what they know, and no mask is made where nothing is padded."""
    model, calls = make(), []
    model.register_forward_pre_hook(lambda _m, given, named: calls.append((given, named)), with_kwargs=True)
    generated(model, PROMPTS[:1])
    assert [given[0].shape for given, _ in calls] == [(1, 8), *[(1, 1)] * 5]
    for i, (_, named) in enumerate(calls):
        assert named.keys() == {"past_key_values", "use_cache", "return_dict", *(() if i else ["logits_to_keep"])}


def test_a_forward_that_gives_no_cache_is_one_sentence():
    class Forgetful(GPT2LMHeadModel):
        def forward(self, input_ids, **given):
            return super().forward(input_ids, use_cache=False)

    with pytest.raises(InputError, match="past_key_values: the model gave no cache with the new tokens"):
        generated(make(Forgetful), PROMPTS[:1])


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_way_to_the_first_product_is_short(options):
    """Nine functions of this library, from `generate` to the projection of the first layer's queries.

    The doors through which a forward is called as in 2019 do not count, nor `project`, which chooses who multiplies.
    """
    model, ways = make(), []

    def is_ours(frame):
        return "gpt2_multi" in frame.filename and frame.name not in ("called", "project")

    model.transformer.h[0].attn.c_attn.register_forward_pre_hook(
        lambda *_: ways.append([frame.name for frame in traceback.extract_stack() if is_ours(frame)])
    )
    generated(model, PROMPTS, **options)
    assert max(map(len, ways)) <= 9 and all(way[0] == "generate" for way in ways)


class Twice(GPT2LMHeadModel):
    """Reads everything two times, as an ensemble does, and takes few arguments."""

    def forward(self, input_ids, past_key_values=None, attention_mask=None, use_cache=None, return_dict=True):
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        super().forward(input_ids, **given)
        return super().forward(input_ids, **given)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_forward_may_read_the_same_twice(options):
    found, expected = (
        cls.from_pretrained("demo").generate(torch.tensor([[5, 9, 5, 9, 7]]), max_new_tokens=9, **options)
        for cls in (Twice, GPT2LMHeadModel)
    )
    assert found.tolist() == expected.tolist()


def test_a_cache_that_a_hook_kept_is_checked_like_any_other():
    model, kept = GPT2LMHeadModel.from_pretrained("demo"), []
    model.register_forward_hook(lambda module, given, output: kept.append(output.past_key_values))
    model.generate(torch.tensor([[5, 9, 7]]), max_new_tokens=3)
    assert [cache.length for cache in kept] == [3, 4, 5]
    for cache in kept:
        with pytest.raises(InputError, match="outside the vocabulary"):
            model(torch.tensor([[10**6]]), past_key_values=cache)


def test_a_forward_that_gives_a_tuple_is_one_sentence():
    class Unnamed(GPT2LMHeadModel):
        def forward(self, *args, **given):
            return super().forward(*args, **given | {"return_dict": False})

    with pytest.raises(InputError, match="return_dict: the model gave a tuple"):
        Unnamed.from_pretrained("demo").generate(torch.tensor([[5, 9]]), max_new_tokens=2)
