"""Generation on another device, which is seldom waited for: a CPU stands in for it, and looks at values are counted."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.pt.generation import beams, generate, rules


class Looks(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for, for which a program waits."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **kwargs or {})


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained("demo")


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 3, "top_k": 5, "temperature": 0.7},
    "unlimited": {"do_sample": True, "top_k": 0},
    "rules": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "bad_words_ids": [[3, 4]]},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_another_device_is_asked_once_in_eight_tokens_whether_all_is_over(
    model: GPT2LMHeadModel, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(10, 22).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    free = model.generate(ids, mask, max_new_tokens=40, eos_token_id=[], **options)
    ends = [int(free[0, 6 + 10]), int(free[1, 6 + 18])]  # so that rows end early, and none at a multiple of eight
    expected = model.generate(ids, mask, max_new_tokens=40, eos_token_id=ends, pad_token_id=0, **options)
    for module in (beams, generate, rules):
        monkeypatch.setattr(module, "is_at_hand", lambda x: False)
    with Looks() as looks:
        found = model.generate(ids, mask, max_new_tokens=40, eos_token_id=ends, pad_token_id=0, **options)
    assert found.equal(expected)
    with Looks() as more:
        model.generate(ids, mask, max_new_tokens=40, eos_token_id=[], **options)
    with Looks() as fewer:
        model.generate(ids, mask, max_new_tokens=8, eos_token_id=[], **options)
    assert more.count - fewer.count <= 4  # one for every eight tokens
    assert looks.count <= more.count
