"""Greedy choice and beams give transformers' tokens, each row alone, under random options."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gpt2_multi.pt import GPT2LMHeadModel
from tests.support import generation_cases as cases
from tests.support.effort import some

SETS = some(100, 40)


def comparable(options):
    """The options as transformers takes them; None where it has none, or has a fault.

    It drops end tokens from bad_words_ids, and min_length where min_new_tokens is given; stop strings may begin in its
    prompts.
    """
    if options.get("do_sample") or options.get("sliding_window"):
        return None
    given = {k: v for k, v in options.items() if not k.startswith(("prompt_lookup", "max_matching", "stop_", "logit_"))}
    if "logit_bias" in options:
        given["sequence_bias"] = [[[token], bias] for token, bias in options["logit_bias"].items()]
    if "min_new_tokens" in given:
        given.pop("min_length", None)
    ends = np.atleast_1d([] if given["eos_token_id"] is None else given["eos_token_id"]).tolist()
    if "bad_words_ids" in given:
        given["bad_words_ids"] = [words for words in given["bad_words_ids"] if words[-1] not in ends]
    return given | {"pad_token_id": 7}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(3))
def test_tokens_equal_transformers(tmp_path, number):
    cases.write(tmp_path, number)
    ours = GPT2LMHeadModel.from_pretrained(tmp_path, param_dtype="float64")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    theirs.generation_config = transformers.GenerationConfig()
    compared = 0
    for seed in range(1000 + number * SETS, 1000 + (number + 1) * SETS):
        case = cases.draw(seed)
        given = comparable(case.options)
        if given is None:
            continue
        own = {k: v for k, v in given.items() if k != "sequence_bias"}
        own |= {k: v for k, v in case.options.items() if k == "logit_bias"}
        for row, mask in zip(case.ids, case.mask, strict=True):
            ids = torch.from_numpy(row[mask != 0])[None]
            found = ours.generate(ids, **own)
            expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **given)
            assert torch.equal(found, expected), (seed, given)
            compared += 1
    assert compared > 0.3 * SETS
