"""What other libraries ask a model and its configuration, and wrappers that stand in for a part of it."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from gpt2_multi import pt
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config

SMALL = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, eos_token_id=None)
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_models_answer_as_transformers_models_do(tmp_path):
    """The answers are those of transformers' own class, made of the same numbers."""
    transformers = pytest.importorskip("transformers")
    ours = pt.GPT2LMHeadModel(SMALL)
    ours.save_pretrained(tmp_path / "m")
    ours = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    for name in ("name_or_path", "base_model_prefix", "main_input_name", "device", "dtype", "_tied_weights_keys"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("is_encoder_decoder", "tie_word_embeddings", "model_type", "use_return_dict", "name_or_path"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    for name in ("num_heads", "head_dim", "split_size", "embed_dim", "scale_attn_weights"):
        assert getattr(ours.transformer.h[1].attn, name) == getattr(theirs.transformer.h[1].attn, name), name
    assert ours.transformer.embed_dim == theirs.transformer.embed_dim
    assert theirs.config.attribute_map.items() <= ours.config.attribute_map.items()
    assert torch.equal(ours.dummy_inputs["input_ids"], theirs.dummy_inputs["input_ids"]) and ours.framework == "pt"
    assert ours.get_memory_footprint() == theirs.get_memory_footprint() == 4 * ours.num_parameters()
    assert ours.get_decoder() is ours.transformer and ours.transformer.get_decoder() is ours.transformer
    assert ours.can_generate() and not pt.GPT2ForTokenClassification.can_generate()
    assert ours.base_model is ours.transformer and ours.transformer.base_model is ours.transformer
    assert ours.config.get_text_config(decoder=True) is ours.config
    assert ours.num_parameters() == theirs.num_parameters()
    ours.lm_head.weight.requires_grad_(False)
    theirs.lm_head.weight.requires_grad_(False)
    assert ours.num_parameters(only_trainable=True) == theirs.num_parameters(only_trainable=True)
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    for tags in ("a", ["a", "b"]):
        ours.add_model_tags(tags)
    assert ours.model_tags == ["a", "b"] and ours.warnings_issued == {}


def test_what_attention_says_of_itself_follows_a_change(tmp_path):
    """Pruned heads count no more; the way to compute is said by the configuration, and by no file."""
    config = SMALL.replace()
    model = pt.GPT2LMHeadModel(config, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path / "m")
    assert "attn_implementation" not in (tmp_path / "m" / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == pt.GPT2Model(SMALL.replace()).config._attn_implementation == "sdpa"
    model.prune_heads({0: [1]})
    attention = model.transformer.h[0].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size, attention.embed_dim) == (3, 4, 12, 16)
    assert model(IDS).logits.shape == (2, 5, 50)


def test_logits_may_be_kept_by_their_places():
    """As a tensor, and as the number of rank 0 that an exporter makes of a number."""
    model = pt.GPT2LMHeadModel(SMALL).eval()
    whole = model(IDS).logits
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]], atol=1e-6)
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor(2)).logits, whole[:, -2:], atol=1e-6)


def test_inputs_may_have_gradients_where_every_weight_is_frozen():
    model = pt.GPT2LMHeadModel(SMALL).requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.is_gradient_checkpointing
    model.enable_input_require_grads()
    assert model(IDS, labels=IDS).loss.requires_grad
    model.disable_input_require_grads()
    model.gradient_checkpointing_disable()
    assert not model(IDS, labels=IDS).loss.requires_grad


class Wrapper(torch.nn.Module):
    """Calls what it holds, and has none of its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_every_part_may_be_wrapped():
    """The body, the embeddings, a block, its parts, the last norm and the head, each alone and all together."""
    model = pt.GPT2LMHeadModel(SMALL).eval()
    expected, tokens = model(IDS, labels=IDS), model.generate(IDS, max_new_tokens=4)
    places = ["lm_head", "transformer.wte", "transformer.wpe", "transformer.ln_f", "transformer.h.0",
              "transformer.h.1.attn", "transformer.h.1.mlp", "transformer.drop", "transformer"]  # fmt: skip
    for place in places:
        model.set_submodule(place, Wrapper(model.get_submodule(place)))
        found = model(IDS, labels=IDS)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss), place
        assert torch.equal(model.generate(IDS, max_new_tokens=4), tokens), place


@pytest.mark.filterwarnings("ignore")  # PyTorch wants it gone one day
def test_a_model_whose_layers_have_no_parameters_generates():
    model = pt.GPT2LMHeadModel(SMALL).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert torch.allclose(quantized(IDS).logits, model(IDS).logits, atol=0.1)
    assert quantized.generate(IDS, max_new_tokens=3).shape == (2, 8)


def test_a_body_that_is_another_thing_altogether_is_named():
    model = pt.GPT2LMHeadModel(SMALL)
    model.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="transformer: expected a GPT2Model, or a wrapper of one, found Linear"):
        _ = model.dtype


def test_a_file_s_other_keys_are_attributes_and_outputs_may_be_tuples():
    config = GPT2Config.from_dict({"n_layer": 2, "task_specific_params": {"a": 1}, "__deepcopy__": 3})
    assert pickle.loads(pickle.dumps(copy.deepcopy(config))).task_specific_params == {"a": 1}
    with pytest.raises(AttributeError, match="no setting 'n_layers'; did you mean 'n_layer'"):
        config.n_layers  # noqa: B018
    model = pt.GPT2LMHeadModel(SMALL.replace(torchscript=True))
    assert isinstance(model(IDS), tuple) and not isinstance(model(IDS, return_dict=True), tuple)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_transition_scores_are_log_probabilities(options):
    model = pt.GPT2LMHeadModel.from_pretrained("demo")
    more = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True, **options}
    output = model.generate(torch.tensor([[5, 9, 7]]), **more)
    beams = {"beam_indices": output.beam_indices} if options else {"normalize_logits": True}
    scores = model.compute_transition_scores(output.sequences, output.scores, **beams)
    torch.testing.assert_close(scores, output.log_probs, atol=1e-5, rtol=1e-5)
