"""Calls without values: vmap, meta and fake tensors, traces and exports, of every head, with a mask and with labels."""

import io
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

import gpt2_multi.pt.model
from gpt2_multi import pt
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import layers

T = 6
IDS = torch.randint(1, 50, (3, T), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 4 + [0] * 2, [0] * 2 + [1] * 4, [1] * T])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
CHOICES = {name: x[:, None].repeat(1, 2, 1) for name, x in TEXT.items()}
HEADS = {
    pt.GPT2Model: (TEXT, {}),
    pt.GPT2LMHeadModel: (TEXT, {"labels": IDS}),
    pt.GPT2DoubleHeadsModel: (
        CHOICES | {"mc_token_ids": torch.full((3, 2), 3)},
        {"labels": CHOICES["input_ids"], "mc_labels": torch.tensor([0, 1, 0])},
    ),
    pt.GPT2ForSequenceClassification: (TEXT, {"labels": torch.tensor([0, 1, 1])}),
    pt.GPT2ForTokenClassification: (TEXT, {"labels": IDS % 2}),
    pt.GPT2ForQuestionAnswering: (
        TEXT,
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 3, 9])},
    ),
}
heads = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)


def build(head, **settings):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=4, eos_token_id=None, **settings)
    return head(config).eval()


def number(output):
    """The sum of an output's losses, or what stands for one where it has none."""
    losses = [x for name, x in output.items() if name.endswith("loss")]
    return sum(losses) if losses else output[0].square().sum()


def first(output):
    """What a call says first."""
    return output[0]


@heads
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_row_are_those_of_the_row_alone(head):
    model, given = build(head), HEADS[head][0] | HEADS[head][1]
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return number(functional_call(model, parameters, (), {name: x[None] for name, x in row.items()}))

    every = vmap(grad(loss), (None, 0))(parameters, given)
    alone = grad(loss)(parameters, {name: x[1] for name, x in given.items()})
    assert all(torch.allclose(every[name][1], alone[name], atol=1e-5) for name in alone)


@heads
def test_meta_and_fake_tensors_have_shapes_alone(head):
    given = HEADS[head][0] | HEADS[head][1]
    with torch.device("meta"):
        empty = build(head)
    meta = {name: x.to("meta") for name, x in given.items()}
    assert number(empty(**meta)).is_meta
    with pytest.raises(InputError, match="attention_mask: expected shape"):
        empty(**meta | {"attention_mask": meta["attention_mask"][..., 1:]})
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in given.items()}
        number(build(head)(**fake)).backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert first(build(head)(**fake)).shape == first(build(head)(**given)).shape


@pytest.mark.parametrize("head", list(HEADS)[1:4])
def test_an_export_takes_other_sizes(head):
    model, given = build(head), HEADS[head][0]
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=32)
    sizes = {name: {0: rows} | ({x.dim() - 1: length} if x.shape[-1] == T else {}) for name, x in given.items()}
    exported = torch.export.export(model, (), given, dynamic_shapes=sizes)
    more = {name: longer(x) for name, x in given.items()}
    assert torch.allclose(first(exported.module()(**more)), first(model(**more)), atol=1e-5)


def test_a_caller_s_own_loop_waits_for_another_device_once(monkeypatch):
    """For the prompt, whose ids are checked; not at each token. What needs no value is checked all the same."""
    model, looks, to_numpy = build(pt.GPT2LMHeadModel), [], layers.to_numpy
    monkeypatch.setattr(layers, "to_numpy", lambda x: (looks.append(x), to_numpy(x))[1])
    monkeypatch.setattr(gpt2_multi.pt.model, "is_at_hand", lambda x: False)
    past, ids = None, IDS
    for _ in range(6):
        output = model(ids, past_key_values=past)
        past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    assert len(looks) == 1
    with pytest.raises(InputError, match="33 tokens are more than n_positions 32"):
        model(IDS[:, :1].expand(-1, 22), past_key_values=past)


def test_a_training_step_on_cuda_waits_for_nothing():
    """Nobody may look at a value there; PyTorch's own kernels stop at a wrong index."""
    assert layers.is_concrete(IDS)
    assert not layers.is_concrete(SimpleNamespace(is_meta=False, is_cuda=True))


def longer(x):
    """Four more rows, and twice as many tokens."""
    x = torch.cat([x, x, x[:1]])
    return torch.cat([x, x], -1) if x.shape[-1] == T else x


@heads
@pytest.mark.filterwarnings("ignore")  # tracing warns about every number that it freezes
@pytest.mark.parametrize("settings", [{"return_dict": False}, {"torchscript": True, "use_cache": False}])
def test_a_trace_of_tuples_takes_other_sizes_and_gives_the_cache_as_pairs(head, settings):
    model, given = build(head, **settings), HEADS[head][0]
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, example_kwarg_inputs=given), file)
    file.seek(0)
    more = {name: longer(x) for name, x in given.items()}
    found, expected = torch.jit.load(file)(**more), model(**more)
    assert torch.allclose(first(found), first(expected), atol=1e-5) and len(found) == len(expected)
