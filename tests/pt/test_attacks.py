"""What hostile or merely odd use found once, so that it stays mended."""

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

from gpt2_multi import pt
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.config import GPT2Config

SMALL = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, eos_token_id=None, initializer_range=0.4
)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return pt.GPT2LMHeadModel(SMALL.replace()).eval()


@pytest.mark.parametrize("change", ["vocab_size", "n_positions", "n_inner"])
def test_a_configuration_changed_alone_cannot_overwrite_a_model(model, change, tmp_path):
    model.save_pretrained(tmp_path / "m")
    setattr(model.config, change, 60)
    with pytest.raises(CheckpointError, match="but the configuration makes it"):
        model.save_pretrained(tmp_path / "m")
    pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m")


def test_a_replaced_head_of_another_size_cannot_overwrite_a_model(tmp_path):
    model = pt.GPT2ForSequenceClassification(SMALL.replace())
    model.score = torch.nn.Linear(16, 3, bias=False)
    with pytest.raises(
        CheckpointError, match=r"score\.weight has shape \(3, 16\), but the configuration makes it \(2, 16\)"
    ):
        model.save_pretrained(tmp_path / "m")


def test_a_head_of_its_own_is_untied_and_survives_a_file(model, tmp_path):
    model.set_output_embeddings(torch.nn.Linear(16, 50, bias=False))
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "m")
    assert torch.allclose(pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m")(IDS).logits, model(IDS).logits, atol=1e-5)
    model.config.tie_word_embeddings = True
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from wte\.weight"):
        model.save_pretrained(tmp_path / "n")


def test_models_that_share_a_configuration_prune_the_same_heads(model):
    other = pt.GPT2LMHeadModel(model.config).eval()
    other.load_state_dict(model.state_dict())
    model.prune_heads({0: [0]})
    other.prune_heads({0: [0]})
    assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_pruning_keeps_frozen_parameters_frozen_and_resizing_the_sizes_of_layers(model):
    model.requires_grad_(False).prune_heads({1: [2]})
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.resize_token_embeddings(60)
    assert model.lm_head.out_features == 60 and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32_at_least(model, dtype):
    ids = torch.randint(0, 50, (64, 32), generator=torch.Generator().manual_seed(0))
    exact = float(model(ids, labels=ids).loss.detach())
    loss = model.to(dtype)(ids, labels=ids).loss
    assert loss.dtype == torch.float32 and abs(float(loss.detach()) - exact) < 0.02 * exact


def test_a_past_is_refused_while_checkpointing_trains(model):
    past = model(IDS).past_key_values
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(InputError, match="past_key_values: cannot be used while gradient checkpointing trains"):
        model(IDS, past_key_values=past)


def test_autocast_with_padding_is_finite(model):
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert torch.isfinite(model(IDS, attention_mask=mask).logits).all()


def past_of(model, change):
    past = model(IDS).past_key_values
    return {
        "layers": tuple(past)[:1],
        "nothing": (),
        "rows": model.init_cache(4, 20),
        "objects": [None, None],
        "no sequence": object(),
        "another dtype": copy.deepcopy(model).half()(IDS).past_key_values,
    }[change]


@pytest.mark.parametrize("change", ["layers", "nothing", "rows", "objects", "no sequence", "another dtype"])
def test_a_past_that_does_not_fit_is_one_sentence(model, change):
    with pytest.raises(InputError, match=r"past_key_values: (expected what a call returned|made for)"):
        model(IDS, past_key_values=past_of(model, change))


def test_caches_slice_like_sequences(model):
    past = model(IDS).past_key_values
    assert len(past[0:1]) == 1 and torch.equal(past[:][1][0], past[1][0])


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"inputs_embeds": torch.zeros(1, 16)}, r"inputs_embeds: expected shape \(any, any, 16\), found \(1, 16\)"),
        ({"inputs_embeds": torch.zeros(1, 2, 16, dtype=torch.long)}, "inputs_embeds: expected floats"),
        ({"input_ids": IDS.tolist()}, "input_ids: expected a torch.Tensor, found list"),
        ({"input_ids": IDS.bool()}, "input_ids: expected integers, found torch.bool"),
        ({"input_ids": IDS, "position_ids": IDS.float()}, "position_ids: expected integers"),
        ({"input_ids": IDS, "token_type_ids": IDS.bool()}, "token_type_ids: expected integers"),
        ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep: expected a whole number from 0, found -1"),
        ({"input_ids": IDS, "head_mask": torch.ones(2, 2, 3, 7, 7)}, r"head_mask: expected shape \(2, 4\)"),
    ],
)
def test_odd_inputs_are_one_sentence(model, inputs, sentence):
    with pytest.raises(InputError, match=sentence):
        model(**inputs)


def test_every_rank_of_head_mask_means_the_same(model):
    rows = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    full = rows[:, None, :, None, None].expand(2, 2, 4, 7, 7)
    expected = model(IDS, head_mask=rows).logits
    assert torch.allclose(model(IDS, head_mask=full).logits, expected, atol=1e-6)
    model.prune_heads({0: [1]})
    assert torch.allclose(model(IDS, head_mask=full).logits, expected, atol=1e-5)
    assert model.bfloat16()(IDS, head_mask=full).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_new", "swish"])
def test_models_are_pickled_and_traced(activation, tmp_path):
    model = pt.GPT2LMHeadModel(SMALL.replace(activation_function=activation, use_cache=False, return_dict=False)).eval()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS)[0], model(IDS)[0]) and again.lm_head.weight is again.transformer.wte.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about every number that it freezes
        traced = torch.jit.trace(model, IDS)
    assert torch.allclose(traced(IDS)[0], model(IDS)[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("where", ["vmap", "meta", "fake"])
def test_values_that_are_not_there_are_not_looked_at(model, where):
    """Shapes are checked all the same."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if where == "vmap":
        found = torch.func.vmap(lambda ids: model(ids, use_cache=False).logits)(IDS[None])
        assert torch.allclose(found[0], model(IDS).logits)
    elif where == "meta":
        with torch.device("meta"):
            empty = pt.GPT2LMHeadModel(SMALL)
        ids = IDS.to("meta")
        assert empty(ids, labels=ids).loss.is_meta
        with pytest.raises(InputError, match="token_type_ids: expected shape"):
            empty(ids, token_type_ids=ids[:, 1:])
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros(2, 3, dtype=torch.long)
            assert model(ids, labels=ids).logits.shape[:2] == ids.shape


def test_lora_for_language_models(model):
    import peft

    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"]))
    assert lora(input_ids=IDS, labels=IDS).loss.requires_grad
    assert lora.generate(input_ids=IDS, max_new_tokens=3).shape == (2, 10)


def test_sampling_when_every_token_is_banned():
    model = pt.GPT2LMHeadModel(SMALL.replace(vocab_size=5)).eval()
    ids = model.generate(torch.tensor([[1]]), no_repeat_ngram_size=1, max_new_tokens=8, do_sample=True)
    assert sorted(ids[0, :5].tolist()) == [0, 1, 2, 3, 4] and ids.shape == (1, 9)


def test_no_rows_are_sampled_as_no_rows(model):
    assert model.generate(torch.zeros(0, 3, dtype=torch.long), do_sample=True, max_new_tokens=2).shape == (0, 5)


def test_the_least_length_counts_no_padding(model):
    first = int(model.generate(IDS[:1, :3], max_new_tokens=1)[0, -1])
    options = {"min_length": 8, "max_new_tokens": 12, "eos_token_id": first, "pad_token_id": 0}
    alone = model.generate(IDS[:1, :3], **options)[0, 3:]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[:1, :3]], 1)
    mask = torch.tensor([[0] * 5 + [1] * 3])
    assert torch.equal(model.generate(padded, mask, **options)[0, 8:], alone) and first not in alone[:5]


@pytest.mark.parametrize("shape", [(1, 5, 16), (2, 5, 8)])
def test_generation_checks_an_encoder_as_a_call_does(shape):
    model = pt.GPT2LMHeadModel(SMALL.replace(add_cross_attention=True)).eval()
    with pytest.raises(InputError, match="encoder_hidden_states: expected shape"):
        model.generate(IDS, encoder_hidden_states=torch.zeros(shape))


def test_options_of_a_file_that_are_not_honoured_are_named(tmp_path):
    (tmp_path / "generation_config.json").write_text(
        '{"num_beam_groups": 4, "min_p": null, "_from_model_config": true}'
    )
    with pytest.warns(UserWarning, match=r"generation_config\.json: num_beam_groups is not an option here"):
        assert GenerationConfig.of_folder(tmp_path, SMALL, {}).extra["num_beam_groups"] == 4


def test_special_tokens_of_old_files():
    assert GenerationConfig.of(SMALL.replace(pad_token_id=-1, eos_token_id=[])).eos_token_ids == ()


def test_the_token_classifier_s_dropout_comes_from_the_file():
    config = GPT2Config.from_dict(SMALL.to_dict() | {"classifier_dropout": 0.7})
    assert pt.GPT2ForTokenClassification(config).dropout.p == 0.7
    assert pt.GPT2ForTokenClassification(SMALL).dropout.p == 0.1


@pytest.mark.parametrize(
    ("cls", "shape"), [(pt.GPT2ForSequenceClassification, (2, 0)), (pt.GPT2DoubleHeadsModel, (2, 2, 0))]
)
def test_a_text_without_a_token_has_no_last_one(cls, shape):
    with pytest.raises(InputError, match="a text has no token to look at; give at least one"):
        cls(SMALL)(torch.zeros(shape, dtype=torch.long), attention_mask=torch.zeros(shape))
