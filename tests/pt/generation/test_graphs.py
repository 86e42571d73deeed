"""Steps that repeat each other on their device: a CPU stands in for it, without graphs; the tokens are the ordinary."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.pt.generation import generate, graphs, rules
from tests.pt.generation.test_waiting import Looks

CONFIG = GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
IDS = torch.arange(18).reshape(2, 9) * 5 % 50
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    made = GPT2LMHeadModel(CONFIG, param_dtype="float64").eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were asked for at once, of those that repeat each other; and no look is at hand."""
    seen, run = [], graphs.Steps.run

    def counted(self: Any, first: int, number: int) -> None:
        seen.append(number)
        run(self, first, number)

    monkeypatch.setattr(graphs.Steps, "run", counted)
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    monkeypatch.setattr(graphs, "LEAST", 16)
    for module in (generate, rules):
        monkeypatch.setattr(module, "is_at_hand", lambda x: False)
    return seen


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "rules": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_length": 20, "min_new_tokens": 25,
        "logit_bias": {5: 0.5, (7, 9): 4.0}, "bad_words_ids": [[4, 5], [3]],
    },
    "sampled": {
        "do_sample": True, "seed": [3, 2**64 - 1], "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95,
        "temperature": 0.8, "num_return_sequences": 2,
    },
    "types": {"token_type_ids": torch.ones_like(IDS)},
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_tokens_are_those_of_the_ordinary_way(
    model: GPT2LMHeadModel, runs: list[int], options: dict[str, Any], mask: torch.Tensor | None
) -> None:
    free = model.generate(IDS, mask, max_new_tokens=40, **options)
    ends = {"eos_token_id": [int(free[0, 9 + 20]), int(free[-1, 9 + 30])], "pad_token_id": 0}
    for more in ({}, ends):
        expected = model.generate(IDS, mask, max_new_tokens=40, **options, **more)
        assert not runs
        assert expected.equal(
            model.generate(IDS, mask, max_new_tokens=40, cache_implementation="static", **options, **more)
        )
        assert runs[0] == 7 and sum(runs) >= expected.shape[1] - 10
        runs.clear()


def test_a_step_asks_for_no_value(model: GPT2LMHeadModel, runs: list[int]) -> None:
    for options in CASES.values():
        model.generate(IDS, MASK, max_new_tokens=9, cache_implementation="static", eos_token_id=1, **options)
        steps = list(graphs.kept[model].values())[-1]
        with Looks() as looks, torch.no_grad():
            steps.once(16)
        assert looks.count == 0


def test_steps_are_used_again_and_read_what_weights_hold(model: GPT2LMHeadModel, runs: list[int]) -> None:
    def both(length: int) -> Any:
        static = model.generate(IDS, max_new_tokens=length, cache_implementation="static")
        assert static.equal(model.generate(IDS, max_new_tokens=length))
        return static, list(graphs.kept[model].values())[-1]

    before, first = both(20)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(torch.linspace(-2, 2, 16))
    after, again = both(20)
    assert again is first and not after.equal(before)
    assert both(10)[1] is first
    assert both(50)[1].columns == 64  # for which the first has no room
    model.transformer.h[1].attn.c_attn.weight = nn.Parameter(torch.randn(48, 16, dtype=torch.float64))
    assert both(20)[1] is not first
    model.lm_head.weight.data = torch.randn(50, 16, dtype=torch.float64)
    both(20)


def test_a_model_keeps_few_steps_and_takes_them_along(model: GPT2LMHeadModel, runs: list[int]) -> None:
    for rows in range(1, graphs.MOST + 2):
        model.generate(IDS[:1].repeat(rows, 1), max_new_tokens=3, cache_implementation="static")
    assert [kind[0] for kind in graphs.kept[model]] == list(range(2, graphs.MOST + 2))
    before = len(graphs.kept)
    model = None  # type: ignore[assignment]
    del model
    gc.collect()
    assert len(graphs.kept) <= before


class Streamer:
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


def hooked(model: GPT2LMHeadModel) -> dict[str, Any]:
    model.transformer.h[1].register_forward_hook(lambda module, given, found: (found[0] * 0.5, *found[1:]))
    return {}


def in_training(model: GPT2LMHeadModel) -> dict[str, Any]:
    model.transformer.drop.train()
    model.transformer.drop.p = 0.0
    return {}


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        in_training,
        *(
            lambda model, more=more: more
            for more in (
                {"streamer": Streamer()},
                {"logits_processor": [lambda ids, logits: -logits]},
                {"stopping_criteria": [lambda ids, scores: ids.shape[1] > 15]},
                {"guidance_scale": 1.5},
                {"num_beams": 2},
                {"prompt_lookup_num_tokens": 2},
                {"return_dict_in_generate": True, "output_scores": True},
                {"max_new_tokens": 80, "sliding_window": True},
            )
        ),
    ],
)
def test_what_others_see_or_steer_goes_the_ordinary_way(model: GPT2LMHeadModel, runs: list[int], change: Any) -> None:
    more = {"max_new_tokens": 12} | change(model)
    ids = IDS[: 1 if "streamer" in more else 2]
    found, expected = (model.generate(ids, cache_implementation=kind, **more) for kind in ("static", None))
    if more.get("return_dict_in_generate"):
        found, expected = found.sequences, expected.sequences
    assert found.equal(expected) and not runs


def test_settings_of_a_part_count(model: GPT2LMHeadModel, runs: list[int]) -> None:
    def own_epsilon() -> None:
        model.transformer.h[0].ln_1.eps = 0.5

    def own_activation() -> None:
        model.transformer.h[0].mlp.act = torch.relu

    def no_bias() -> None:
        model.transformer.h[0].mlp.c_fc.bias = None

    with torch.no_grad():
        assert graphs.is_served(model, IDS)
        for change, back in (
            (own_epsilon, lambda: setattr(model.transformer.h[0].ln_1, "eps", model.config.layer_norm_epsilon)),
            (own_activation, lambda: setattr(model.transformer.h[0].mlp, "act", model.transformer.h[1].mlp.act)),
            (no_bias, lambda: None),
        ):
            change()
            assert not graphs.is_served(model, IDS)
            back()
