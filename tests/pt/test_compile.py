"""`torch.compile` of the model's body: one graph, and none made anew while generation goes on."""

import pytest

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounter

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel

TINY = GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield GPT2LMHeadModel(TINY).eval()
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padding", [0, 3])
def test_generation_compiles_a_prefill_and_a_decode_step(model, batch, padding):
    ids = torch.randint(64, (batch, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    expected = model.generate(ids, mask, max_new_tokens=40)
    counter = CompileCounter()
    model.transformer.compile(backend=counter, fullgraph=True)
    graphs, columns = [], []
    for column in model.stream_tokens(ids, mask, max_new_tokens=40):
        columns.append(column)
        graphs.append(counter.frame_count)
    assert torch.equal(torch.stack(columns, 1), expected[:, 8:])
    assert graphs[0] == 1 and graphs[-1] <= 3
    assert len(set(graphs[2:])) == 1, f"compiled again after the second new token: {graphs}"


def test_prompts_of_every_size_share_six_graphs(model):
    """A prefill and a decode step of the first size, of any length, and of any batch."""
    prompts = [torch.randint(64, (batch, length)) for batch in (1, 4, 6) for length in (8, 9, 13, 20)]
    expected = [model.generate(ids, max_new_tokens=12) for ids in prompts]
    counter = CompileCounter()
    model.transformer.compile(backend=counter, fullgraph=True)
    assert all(
        torch.equal(model.generate(ids, max_new_tokens=12), same) for ids, same in zip(prompts, expected, strict=True)
    )
    assert counter.frame_count <= 6


def test_the_whole_model_compiles_a_prefill_and_a_decode_step_too(model):
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    expected, counter = model.generate(ids, max_new_tokens=20), CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    assert torch.equal(model.generate(ids, max_new_tokens=20), expected) and 1 <= counter.frame_count <= 3


def test_a_training_step_is_one_graph(model):
    counter = CompileCounter()
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True)
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert counter.frame_count == 1
