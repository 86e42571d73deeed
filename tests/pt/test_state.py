"""State dictionaries and parameters as others use them: savers, loaders, optimizers, pruning, averages."""

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from gpt2_multi import CheckpointError, GPT2Config, InputError, pt
from tests.support import adapters, fixtures

SMALL = GPT2Config(vocab_size=31, n_positions=24, n_embd=12, n_layer=2, n_head=3, num_labels=3, pad_token_id=0)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
TIED = [pt.GPT2LMHeadModel, pt.GPT2DoubleHeadsModel]


def make(cls=pt.GPT2LMHeadModel, seed=0, **changes):
    torch.manual_seed(seed)
    model = cls(SMALL.replace(initializer_range=0.3, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model):
    return model(IDS).logits.detach()


def is_tied(model):
    return model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("name", ["lm", "double_heads", "cross_attention", "sequence_classification"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_contiguous_after_loading_and_views_where_asked_for(name, dtype):
    cls = adapters.classes(pt)[fixtures.head(name)]
    model, view = (cls.from_pretrained(fixtures.folder(name), param_dtype=dtype, mmap=mmap) for mmap in (False, True))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert not view.get_parameter(model.head != "base" and "transformer.h.0.mlp.c_fc.weight").is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), view.parameters(), strict=True))


@pytest.mark.parametrize("cls", TIED)
def test_a_tied_head_is_saved_once_and_loaded_back(cls, tmp_path):
    import safetensors.torch

    model = make(cls)
    state = model.state_dict()
    assert HEAD not in state and len(state) == len(list(model.parameters()))
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    safetensors.torch.save_model(model, str(tmp_path / "b.safetensors"))
    torch.save(state, tmp_path / "c.bin")
    for given in (
        safetensors.torch.load_file(tmp_path / "a.safetensors"),
        safetensors.torch.load_file(tmp_path / "b.safetensors"),
        torch.load(tmp_path / "c.bin"),
        state | {HEAD: state[EMBEDDING]},
        {HEAD if name == EMBEDDING else name: x for name, x in state.items()},  # as savers that drop the other do it
    ):
        for assign in (False, True):
            other = make(cls, seed=1)
            other.load_state_dict(given, assign=assign)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
            assert is_tied(other) and all(parameter.requires_grad for parameter in other.parameters())
    other = make(cls, seed=1)
    assert safetensors.torch.load_model(other, str(tmp_path / "a.safetensors")) == (set(), [])


@pytest.mark.parametrize("holder", [lambda model: model, torch.nn.Sequential], ids=["alone", "held by another"])
def test_a_head_that_is_another_is_one_sentence(holder):
    state = holder(make(tie_word_embeddings=False)).state_dict()
    head, embedding = (next(name for name in state if name.endswith(end)) for end in (HEAD, EMBEDDING))
    model = holder(make())
    with pytest.raises(RuntimeError, match=f"{head} differs from {embedding}, although the head is the token"):
        model.load_state_dict(state)
    holder(make(tie_word_embeddings=False)).load_state_dict(state)
    assert head not in model.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lm_head"):
        holder(make(tie_word_embeddings=False)).load_state_dict(model.state_dict())


@pytest.mark.parametrize("changes", [{}, {"add_cross_attention": True}, {"tie_word_embeddings": False}], ids=str)
def test_a_state_dictionary_of_transformers_is_taken(changes):
    transformers = pytest.importorskip("transformers")
    settings = SMALL.replace(**changes).to_dict()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    model = make(seed=1, **changes)
    model.load_state_dict(theirs.state_dict())
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    model.transformer.load_state_dict(theirs.transformer.state_dict())


def test_the_whole_state_of_a_model_that_was_cut_is_taken():
    model = make()
    apart = {name: x.unflatten(0, (3, -1)) if ".c_attn." in name else x for name, x in model.state_dict().items()}
    other = make(seed=1)
    other.load_state_dict(apart)
    for found in (other, pt.GPT2LMHeadModel.from_pretrained(None, config=SMALL, state_dict=apart)):
        assert torch.equal(logits(found), logits(model))


def test_a_whole_state_without_the_head_is_taken():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model, other = make(), make(seed=1)
    set_model_state_dict(other, model.state_dict(), options=StateDictOptions(full_state_dict=True))
    assert torch.equal(logits(other), logits(model)) and is_tied(other)


def test_copies_pickles_and_averages_keep_the_tie():
    model = make()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(make(seed=1))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module):
        assert is_tied(other) and other.lm_head.weight is not model.lm_head.weight
        assert HEAD not in other.state_dict()
        other.load_state_dict(make(seed=2).state_dict())
        assert torch.equal(logits(other), logits(make(seed=2))) and not torch.equal(logits(model), logits(other))
    average.load_state_dict(average.state_dict())


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # which LBFGS does
def test_others_prune_flatten_and_optimize_parameters(tmp_path):
    make().save_pretrained(tmp_path / "m")
    model = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    before = logits(model)
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(torch.zeros_like(vector), model.parameters())
    assert not logits(model).any()
    vector_to_parameters(vector, model.parameters())
    assert torch.equal(logits(model), before)

    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return loss

    first = float(optimizer.step(closure))
    assert float(closure()) < first

    kernel = model.transformer.h[0].attn.c_attn
    prune.l1_unstructured(kernel, "weight", 0.5)
    assert float((kernel.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    other = make(seed=1)
    prune.identity(other.transformer.h[0].attn.c_attn, "weight")
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    prune.remove(kernel, "weight")
    model.save_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(pt.GPT2LMHeadModel.from_pretrained(tmp_path / "pruned")), logits(other))


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is deprecated")  # the latter in 2.8
def test_distributed_checkpoints_in_one_process(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other, third = make(), make(seed=1), make(seed=2)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "a")
    dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path / "a")  # in place
    assert torch.equal(logits(other), logits(model))
    state = get_model_state_dict(third)
    dcp.load(state_dict := {"model": state}, checkpoint_id=tmp_path / "a")
    set_model_state_dict(third, state_dict["model"])
    assert torch.equal(logits(third), logits(model)) and is_tied(third)


class Valued(pt.GPT2LMHeadModel):
    """A subclass as people write them: it takes a configuration alone, and has a layer and a buffer of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.value = torch.nn.Linear(config.n_embd, 1)
        self.register_buffer("places", torch.arange(3))


@pytest.mark.filterwarnings("ignore:.*initialised anew")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_subclass_has_what_is_its_own_after_loading(dtype, tmp_path):
    make().save_pretrained(tmp_path / "m")
    model = Valued.from_pretrained(tmp_path / "m", dtype=dtype)
    plain = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m", dtype=dtype)
    assert torch.equal(logits(model), logits(plain)) and is_tied(model) and model.places.tolist() == [0, 1, 2]
    assert model.value(model.transformer(IDS).last_hidden_state).dtype == getattr(torch, dtype)
    plain.value = torch.nn.Linear(12, 1)
    with pytest.raises(CheckpointError, match=r"value\.weight, value\.bias of GPT2LMHeadModel is none of GPT-2's"):
        plain.save_pretrained(tmp_path / "lost")


class Reward(pt.GPT2PreTrainedModel):
    """A reward model as people write it, with a shared layer, a scalar, and a second GPT-2 inside."""

    def __init__(self, config, scale=1.0, ref=True):
        super().__init__(config)
        self.scale = scale
        self.transformer = pt.GPT2Model(config)
        self.ref = pt.GPT2Model(config) if ref else None
        self.score = torch.nn.Linear(config.n_embd, 1, bias=False)
        self.again = torch.nn.Linear(config.n_embd, 1, bias=False)
        self.again.weight = self.score.weight
        self.offset = torch.nn.Parameter(torch.tensor(2.0))
        self.decoder = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.decoder.weight = self.transformer.wte.weight
        self.register_buffer("kept", torch.tensor([True, False]))
        self.register_buffer("left", torch.ones(2), persistent=False)
        self.post_init()

    def forward(self, ids):
        hidden = self.transformer(ids).last_hidden_state
        return self.decoder(hidden).sum() * self.scale + self.score(hidden).sum() + self.offset


@pytest.mark.filterwarnings("ignore:.*initialised anew")
@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}, {"max_shard_size": 3000}], ids=str)
def test_a_class_on_the_base_class_loads_the_body_and_keeps_what_is_its_own(options, tmp_path):
    make().save_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"has no offset, ref\.wte\.weight, .* more: initialised anew"):
        model, info = Reward.from_pretrained(tmp_path / "m", scale=3.0, n_positions=24, output_loading_info=True)
    body = pt.GPT2Model.from_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.transformer.parameters(), body.parameters(), strict=True))
    assert {"score.weight", "offset", "kept", "ref.ln_f.bias"} <= set(info["missing_keys"])
    assert not any(name.startswith(("transformer", "decoder", "again", "left")) for name in info["missing_keys"])
    assert model.scale == 3.0 and model.config_class is GPT2Config and not any(p.is_meta for p in model.parameters())
    assert model.decoder.weight is model.transformer.wte.weight and model.again.weight is model.score.weight
    first = [float(x.detach().std()) for x in (model.ref.h[0].mlp.c_fc.weight, model.score.weight)]
    assert 0.01 < first[0] < 0.5 and 0.05 < first[1] < 0.6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.kept.logical_not_()
    model.save_pretrained(tmp_path / "own", **options)
    again, info = Reward.from_pretrained(tmp_path / "own", scale=3.0, output_loading_info=True)
    assert not info["missing_keys"] and info["unexpected_keys"] == [] and again.offset == model.offset
    assert torch.equal(again(IDS), model.eval()(IDS)) and torch.equal(again.kept, model.kept)
    assert torch.equal(again.ref(IDS).last_hidden_state, model.ref(IDS).last_hidden_state)
    assert again.decoder.weight is again.transformer.wte.weight and again.again.weight is again.score.weight
    state = Reward.from_pretrained(None, config=SMALL, state_dict=model.state_dict(), scale=3.0)
    assert torch.equal(state(IDS), model(IDS)) and torch.equal(state.kept, model.kept)
    with pytest.raises(CheckpointError, match=r"has unexpected 28 tensors: ref\..*the class that you load it with"):
        Reward.from_pretrained(tmp_path / "own", ref=False)
    with pytest.raises(TypeError, match="from_pretrained has no argument 'scal'"):
        Reward.from_pretrained(tmp_path / "own", scal=3.0)
    with pytest.raises(CheckpointError, match="state_dict: lacks offset"):
        model.save_pretrained(
            tmp_path / "lost", state_dict={k: x for k, x in model.state_dict().items() if k != "offset"}
        )


def test_a_state_that_is_saved_is_in_int8_where_the_model_is(tmp_path):
    make().save_pretrained(tmp_path / "m")
    floats = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m")
    model = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "m", quantization="int8")
    own, name = model.state_dict(), "transformer.h.0.attn.c_attn.weight"
    for state in (own, {key: x.clone() for key, x in own.items()}, own | {name: own[name].flip(0)}):
        model.save_pretrained(tmp_path / "own", state_dict=state)
        found = pt.GPT2LMHeadModel.from_pretrained(tmp_path / "own").state_dict()
        assert all(torch.equal(x, state[key]) for key, x in found.items()) and found.keys() == own.keys()
    for holder, state, sentence in (
        (
            model,
            floats.state_dict(),
            r"transformer\.wte\.weight is float32\[.*\], expected int8, as in the model; give",
        ),
        (model, {key: x for key, x in own.items() if key != f"{name}_scale"}, f"lacks {name}_scale"),
        (floats, own, r"transformer\.wte\.weight is int8\[.*\], expected floats, as in the model; give"),
    ):
        with pytest.raises(CheckpointError, match=f"^state_dict: {sentence}"):
            holder.save_pretrained(tmp_path / "own", state_dict=state)


@pytest.mark.filterwarnings("ignore:.*initialised anew")
def test_a_head_of_a_subclass_is_listed_as_missing_and_comes_back(tmp_path):
    make().save_pretrained(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"has no value\.weight and value\.bias and places: initialised anew"):
        model, info = Valued.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert info["missing_keys"] == ["value.weight", "value.bias", "places"]
    model.places.add_(5)
    model.save_pretrained(tmp_path / "own")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, info = Valued.from_pretrained(tmp_path / "own", output_loading_info=True, dtype="bfloat16")
    assert info["missing_keys"] == [] and again.places.tolist() == [5, 6, 7] and again.places.dtype == torch.int64
    assert torch.equal(again.value.weight, model.value.weight.bfloat16())
    wider = type("Wider", (Valued,), {"__init__": lambda self, c: (Valued.__init__(self, c), widen(self, c))[0]})
    with pytest.raises(CheckpointError, match=r"value\.weight has shape \(1, 12\), expected \(2, 12\) by the model's"):
        wider.from_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match=r"value\.(weight|bias) has shape \(1.*\), not \(2.*\): initialised anew"):
        wider.from_pretrained(tmp_path / "own", ignore_mismatched_sizes=True)


def test_a_class_without_a_body_by_its_name_is_one_sentence(tmp_path):
    class Named(pt.GPT2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.gpt = pt.GPT2Model(config)

    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"Named: expected a GPT2Model as self\.transformer"):
        Named.from_pretrained(tmp_path)


def widen(model, config):
    model.value = torch.nn.Linear(config.n_embd, 2)


def test_first_values_of_own_layers_are_the_class_s_own():
    class Zeros(Reward):
        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, torch.nn.Linear):
                module.weight.data.fill_(7)

    model = Zeros._from_config(SMALL, dtype="bfloat16")
    assert (model.score.weight == 7).all() and model.dtype == model.score.weight.dtype == torch.bfloat16
    assert not (model.transformer.h[0].mlp.c_fc.weight == 7).any() and not (model.decoder.weight == 7).any()
    model.init_weights()
    assert not (model.transformer.h[0].mlp.c_fc.weight == 7).any()


def test_a_part_that_says_nothing_of_its_layout_is_taken_as_it_is():
    """A square kernel alone may be either; beside one that is not square, or a bias that tells, it is turned."""
    model = pt.GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=4, n_embd=8, n_layer=1, n_head=2))
    path = "transformer.h.0.attn."
    square, wide = torch.randn(8, 8), torch.randn(8, 24)
    model.load_state_dict({f"{path}c_proj.weight": square}, strict=False)
    assert torch.equal(model.transformer.h[0].attn.c_proj.weight, square)
    told = {f"{path}c_proj.weight": square, f"{path}c_attn.weight": wide, f"{path}c_attn.bias": torch.randn(24)}
    model.load_state_dict(told, strict=False)
    assert torch.equal(model.transformer.h[0].attn.c_proj.weight, square.T)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, wide.T)
