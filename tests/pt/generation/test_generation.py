"""Generation in PyTorch: the recorded tokens, the specification's rules, padding, counts of compilations, bad input."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpt2_multi.errors import InputError
from gpt2_multi.generation import rules as spec
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.generation.request import options_of
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.pt.generation import beams, rules
from tests.support import fixtures
from tests.support.cases import SAMPLING

RECORDED = {key: torch.from_numpy(value.copy()) for key, value in fixtures.reference("lm").items()}
SAMPLES = {
    key: torch.from_numpy(value.copy())
    for key, value in fixtures.read_safetensors(fixtures.DATA / "lm" / "sampling.safetensors").items()
}


@pytest.fixture(scope="module", params=["float32", "float64"])
def model(request):
    """The recorded language model."""
    return GPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype=request.param)


@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {}), ("greedy_eos", {}), ("min_new_12_eos", {"min_new_tokens": 12})],
)
def test_greedy_tokens_equal_the_recorded(model, name, options):
    end = int(RECORDED["gen.eos"]) if name != "greedy" else None
    found = model.generate(
        RECORDED["gen.input_ids"], RECORDED["in.mask_left"], max_new_tokens=20, eos_token_id=end, **options
    )
    assert torch.equal(found, RECORDED[f"gen.{name}"])


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [("greedy", {}), ("repetition_1.3", {"repetition_penalty": 1.3}), ("no_repeat_2", {"no_repeat_ngram_size": 2})],
)
def test_a_row_alone_equals_the_recorded_and_the_row_in_a_batch(model, name, options, row):
    recorded = RECORDED[f"gen_alone.{name}.{row}"]
    options = options | {"max_new_tokens": 20, "eos_token_id": None}
    alone = model.generate(recorded[:, :-20], **options)
    assert torch.equal(alone, recorded)
    batch = model.generate(RECORDED["gen.input_ids"], RECORDED["in.mask_left"], **options)
    assert torch.equal(batch[row, -20:], recorded[0, -20:])


def test_every_recorded_greedy_case_is_run():
    names = {key.split(".", 2)[1].rsplit(".", 1)[0] for key in RECORDED if key.startswith("gen_alone.")}
    assert {name.split(".")[0] for name in names} == {"greedy", "repetition_1", "no_repeat_2", "beam4"}


@pytest.mark.parametrize("seed", [0, 12345678901])
@pytest.mark.parametrize("case", SAMPLING)
def test_samples_equal_the_recorded(model, case, seed):
    options = {"top_k": 0, **SAMPLING[case]}
    found = model.generate(
        SAMPLES["input_ids"],
        SAMPLES["attention_mask"],
        max_new_tokens=20,
        eos_token_id=None,
        do_sample=True,
        seed=seed,
        **options,
    )
    assert torch.equal(found, SAMPLES[f"{case}.seed_{seed}"])


def test_beams_equal_the_recorded(model):
    given = {"max_new_tokens": 12, "num_beams": 4, "pad_token_id": 1}
    prompts = (RECORDED["gen.input_ids"], RECORDED["in.mask_left"])
    assert torch.equal(model.generate(*prompts, eos_token_id=None, **given), RECORDED["gen.beam4"])
    given |= {"eos_token_id": int(RECORDED["gen.eos"]), "num_return_sequences": 2, "length_penalty": 0.8}
    assert torch.equal(model.generate(*prompts, **given), RECORDED["gen.beam4_eos"])


def test_beams_move_as_they_are_chosen():
    """What they have in common is the same in the cache, and stays."""
    texts = np.array([[7, 1, 1], [7, 1, 2], [7, 3, 1], [8, 3, 1]])
    history = torch.tensor([[7, 71, 711], [7, 71, 712], [7, 73, 731], [8, 83, 831]])
    for rows in itertools.product(range(4), repeat=4):
        parts = [history[:, None, :, None].clone() for _ in range(2)]
        beams.move(parts, list(rows), texts)
        assert all(part[:, 0, :, 0].equal(history[list(rows)]) for part in parts), rows


@pytest.mark.parametrize("row", [0, 1, 2])
def test_beams_of_a_row_alone_equal_the_recorded(model, row):
    recorded = RECORDED[f"gen_alone.beam4.{row}"]
    found = model.generate(recorded[:, :-12], max_new_tokens=12, num_beams=4, eos_token_id=None)
    assert torch.equal(found, recorded)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}])
def test_a_detailed_answer_explains_its_tokens(model, options):
    ids, mask = RECORDED["gen.input_ids"], RECORDED["in.mask_left"]
    options = options | {"max_new_tokens": 6, "eos_token_id": int(RECORDED["gen.eos"])}
    plain = model.generate(ids, mask, **options)
    output = model.generate(ids, mask, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
    new = output.sequences[:, ids.shape[1] :]
    assert torch.equal(output.sequences, plain) and len(output.scores) == len(output.logits) >= new.shape[1]
    rows = torch.arange(len(new))[:, None].expand_as(new) if output.beam_indices is None else output.beam_indices
    scores = torch.stack(output.scores).log_softmax(-1)
    expected = scores[torch.arange(new.shape[1]), rows, new]
    made = output.log_probs != 0
    torch.testing.assert_close(output.log_probs[made], expected[made])
    if "num_beams" in options:
        assert torch.equal(made, rows >= 0)
        torch.testing.assert_close(output.sequences_scores, output.log_probs.sum(-1) / made.sum(-1))


def test_lookup_takes_fewer_steps_to_the_tokens_of_greedy_choice(model):
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4, [5, 6, 7, 8, 9] * 4])
    bias = {(a, b): 1e4 for a, b in zip([5, 6, 7, 8, 9], [6, 7, 8, 9, 5], strict=True)}
    options = {"max_new_tokens": 30, "eos_token_id": None, "logit_bias": bias}
    calls = []
    hook = model.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = model.generate(ids, prompt_lookup_num_tokens=5, **options)
    finally:
        hook.remove()
    assert torch.equal(found, model.generate(ids, **options)) and len(calls) < 2 * 8


def test_a_sliding_window_shows_the_end_of_a_long_text(model):
    ids = RECORDED["gen.input_ids"][:2].repeat(1, 5)  # (2, 85), beyond 64
    with pytest.raises(InputError, match="are more than n_positions 64"):
        model.generate(ids, max_new_tokens=70)
    found = model.generate(ids, max_new_tokens=70, eos_token_id=None, sliding_window=True)
    for length in range(85, 155):
        shown = found[:, spec.window_start(length, 64) : length]
        assert torch.equal(model(shown).logits[:, -1].argmax(-1), found[:, length])
    short = {"max_new_tokens": 20, "eos_token_id": None}
    prompt = RECORDED["gen.input_ids"]
    assert torch.equal(model.generate(prompt, sliding_window=True, **short), model.generate(prompt, **short))


def test_a_seed_for_each_prompt(model):
    ids, options = RECORDED["gen.input_ids"], {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
    found = model.generate(ids, seed=[9, 2**64 - 1, 4], num_return_sequences=2, **options)
    for row, seed in enumerate([9, 10, 2**64 - 1, 0, 4, 5]):
        assert torch.equal(found[row], model.generate(ids[row // 2][None], seed=seed, **options)[0])
    with pytest.raises(InputError, match="seed: expected one number, or one for each of 3 prompts, found 2"):
        model.generate(ids, seed=[1, 2], **options)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"sliding_window": True}])
def test_nothing_to_do_is_done_in_every_way(model, options):
    assert model.generate(torch.zeros(0, 5, dtype=torch.long), max_new_tokens=3, **options).shape == (0, 8)
    assert model.generate(torch.zeros(2, 5, dtype=torch.long), max_new_tokens=0, **options).shape == (2, 5)


def test_streams_are_of_tokens_that_are_known(model):
    for options, sentence in [
        ({"num_beams": 2}, "num_beams: beams are not"),
        ({"return_dict_in_generate": True}, "gives tokens only"),
    ]:
        with pytest.raises(InputError, match=sentence):
            model.stream_tokens(RECORDED["gen.input_ids"], **options)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_caches_of_both_kinds_are_accepted(model, kind):
    ids = RECORDED["gen.input_ids"]
    assert torch.equal(model.generate(ids, cache_implementation=kind), model.generate(ids))


def test_a_static_cache_is_made_used_and_used_again_by_hand(model):
    ids = RECORDED["gen.input_ids"]
    cache = model.init_cache(len(ids), ids.shape[1] + 4)
    for _ in range(2):
        logits, made = model(ids, past_key_values=cache).logits, []
        for _ in range(4):
            made.append(logits[:, -1:].argmax(-1))
            logits = model(made[-1], past_key_values=cache).logits
        assert torch.equal(torch.cat(made, 1), model.generate(ids, max_new_tokens=4, eos_token_id=None)[:, -4:])
        cache.reset()


def test_padding_may_stand_on_either_side_and_in_the_middle(model):
    ids = RECORDED["gen.input_ids"][:1, -6:]
    alone = model.generate(ids, max_new_tokens=8, eos_token_id=None)[:, 6:]
    for where in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8], [0, 2, 3, 5, 6, 8]):
        padded, mask = torch.full((1, 9), 11), torch.zeros(1, 9, dtype=torch.long)
        padded[0, where], mask[0, where] = ids[0], 1
        assert torch.equal(model.generate(padded, mask, max_new_tokens=8, eos_token_id=None)[:, 9:], alone)


def test_sequences_of_one_prompt_are_the_rows_of_the_seed(model):
    ids = RECORDED["gen.input_ids"][:2]
    options = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
    many = model.generate(ids, num_return_sequences=3, seed=5, **options)
    for row in range(6):
        assert torch.equal(many[row], model.generate(ids[row // 3][None], seed=5 + row, **options)[0])
    assert len({tuple(row.tolist()) for row in many[:3]}) == 3


def test_streamed_columns_are_what_generate_appends(model):
    ids = RECORDED["gen.input_ids"]
    columns = list(model.stream_tokens(ids, max_new_tokens=5, eos_token_id=None))
    assert torch.equal(torch.stack(columns, 1), model.generate(ids, max_new_tokens=5, eos_token_id=None)[:, -5:])


def test_finished_rows_are_filled_and_the_loop_ends_with_the_last(model):
    ids, end = RECORDED["gen.input_ids"], int(RECORDED["gen.eos"])
    found = model.generate(ids, RECORDED["in.mask_left"], max_new_tokens=40, eos_token_id=[end, 502], pad_token_id=9)
    for row in found[:, 17:]:
        ends = (row == end).nonzero()
        assert not len(ends) or (row[ends[0, 0] + 1 :] == 9).all()
    greedy = model.generate(ids[:1], max_new_tokens=40, eos_token_id=None)
    stop = int(greedy[0, 19])
    assert model.generate(ids[:1], max_new_tokens=40, eos_token_id=stop).shape[1] <= 20


def test_defaults_come_from_the_model_and_options_win(model):
    assert model.generation_config.eos_token_id == 0 and model.generation_config.pad_token_id == 1
    ids = RECORDED["gen.input_ids"]
    assert model.generate(ids, eos_token_id=None).shape[1] == 37
    assert model.generate(ids, max_new_tokens=0).shape[1] == 17
    own = GenerationConfig(max_new_tokens=3)
    assert model.generate(ids, generation_config=own).shape[1] == 20
    assert model.generate(ids, generation_config=own, max_new_tokens=2).shape[1] == 19


def test_cross_attention_generates_with_an_encoder():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, add_cross_attention=True, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config, param_dtype="float64").eval()
    ids, states = torch.randint(0, 31, (2, 4)), torch.randn(2, 5, 12, dtype=torch.float64)
    options = {"encoder_hidden_states": states, "encoder_attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])}
    found = model.generate(ids, max_new_tokens=6, eos_token_id=None, **options)
    for length in range(4, 10):
        step = model(found[:, :length], **options).logits[:, -1].argmax(-1)
        assert torch.equal(step, found[:, length])


@pytest.mark.parametrize("rule", ["top_k", "top_p", "penalty", "repeats"])
def test_rules_equal_the_specification(rule):
    rng = np.random.default_rng(7)
    for _ in range(30):
        logits = np.round(rng.normal(0, 3, (4, 40)), 1)  # rounded, so that there are ties
        ids = rng.integers(0, 6, (4, 12))
        mask = np.sort(rng.random((4, 12)) > 0.3)
        mask[:, -2:] = True
        t = torch.from_numpy(logits)
        if rule == "top_k":
            found, expected = rules.keep_top_k(t, 5), spec.keep_top_k(logits, 5)
        elif rule == "top_p":
            found, expected = rules.keep_top_p(t, 0.7), spec.keep_top_p(logits, 0.7)
        elif rule == "penalty":
            found = rules.penalise(t, torch.from_numpy(ids), torch.from_numpy(mask), 1.7)
            expected = [spec.penalise(a, b[m], 1.7) for a, b, m in zip(logits, ids, mask, strict=True)]
        else:
            size = int(rng.integers(1, 4))
            found = rules.ban_repeats(t, torch.from_numpy(ids), torch.from_numpy(mask), size)
            expected = [spec.ban_repeats(a, b[m], size) for a, b, m in zip(logits, ids, mask, strict=True)]
        np.testing.assert_allclose(found.numpy(), np.stack(list(expected)), rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 + 7, 2**64 - 1])
def test_noise_equals_the_specification(seed):
    tokens = np.arange(5000)
    keys = rules.as_tensors(options_of(GenerationConfig(seed=seed), GPT2Config(), 3, None), torch.device("cpu")).streams
    for step in (0, 1, 1000):
        found = rules.gumbel(keys, step, torch.from_numpy(np.tile(tokens, (3, 1))), torch.float64)
        for row in range(3):
            np.testing.assert_allclose(found[row].numpy(), spec.gumbel(seed, row, step, tokens), rtol=1e-12, atol=1e-15)


def test_decode_steps_compile_once(model):
    """One graph for the prefill, and at most two for all later steps: the first with its length, then with any."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    ids = RECORDED["gen.input_ids"]
    expected = model.generate(ids, max_new_tokens=20, eos_token_id=None)
    torch._dynamo.reset()
    forward = model.transformer.forward
    model.transformer.forward = torch.compile(forward, backend=counter, fullgraph=True)
    try:
        assert torch.equal(model.generate(ids, max_new_tokens=20, eos_token_id=None), expected)
    finally:
        del model.transformer.forward
    assert 1 <= counter.frame_count <= 3


BAD = {
    "an unknown option": ({"temprature": 1}, TypeError, "no option 'temprature'; did you mean 'temperature'"),
    "a bad value": ({"top_p": 2}, InputError, "top_p: expected a number above 0, up to 1, found 2"),
    "beyond the context": (
        {"max_new_tokens": 48},
        InputError,
        "17 prompt tokens and 48 new ones are more than n_p",
    ),
    "no room": ({"max_length": 17}, InputError, "max_length: 17 leaves no room after 17 prompt tokens"),
    "no cross-attention": ({"encoder_hidden_states": torch.zeros(3, 2, 48)}, InputError, "no cross-attention"),
    "a short mask": ({"attention_mask": torch.ones(3, 16)}, InputError, r"attention_mask: expected shape \(3, 17\)"),
    "an empty row": (
        {"attention_mask": torch.tensor([[1], [0], [1]]).expand(3, 17)},
        InputError,
        "a prompt has no token",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(model, name):
    options, error, sentence = BAD[name]
    with pytest.raises(error, match=sentence):
        model.generate(RECORDED["gen.input_ids"], **options)


def test_bad_prompts_are_one_sentence(model):
    with pytest.raises(InputError, match=r"input_ids: the id 503 is outside the vocabulary \(0 to 502\)"):
        model.generate(torch.tensor([[503]]))
    with pytest.raises(InputError, match="a prompt has no token"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match="input_ids: expected shape"):
        model.generate(torch.tensor([1, 2]))
    with pytest.raises(InputError, match="input_ids: expected integers"):
        model.generate(torch.tensor([[1.0]]))


def test_the_last_position_can_be_reached(model):
    assert model.generate(torch.full((1, 60), 5), max_new_tokens=4, eos_token_id=None).shape == (1, 64)


def test_no_rows_give_no_rows(model):
    assert model.generate(torch.zeros(0, 5, dtype=torch.long), max_new_tokens=3, eos_token_id=None).shape == (0, 8)
