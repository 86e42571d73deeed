"""Those of bitsandbytes and torchao are collected where both are installed, as in the session `large`."""

from importlib.util import find_spec

import pytest

ARE_THERE = all(find_spec(name) for name in ("bitsandbytes", "torchao"))
collect_ignore = [] if ARE_THERE else ["test_bitsandbytes.py", "test_torchao.py"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A model with random weights, every one of them."""
    import torch

    from gpt2_multi import GPT2Config, pt

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=2, eos_token_id=None, bos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    model = pt.GPT2LMHeadModel(config)
    for x in model.parameters():
        x.data += torch.randn_like(x) * 0.1
    folder = tmp_path_factory.mktemp("quantized") / "base"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def check_saved(tmp_path):
    """A function that saves a model with each state that programs give it, and reads what these states have."""
    import accelerate
    import torch

    from gpt2_multi import pt

    def check(model, other, ids):
        own = model.state_dict()
        for name, state, expected in (
            ("own", own, model),
            ("clones", {key: x.clone() for key, x in own.items()}, model),
            ("gathered", accelerate.Accelerator(cpu=True).get_state_dict(model), model),
            ("other", other.state_dict(), other),
        ):
            model.save_pretrained(tmp_path / name, state_dict=state)
            found = pt.GPT2LMHeadModel.from_pretrained(tmp_path / name)
            assert torch.equal(found(ids).logits, expected(ids).logits), name

    return check
