"""Steps by quicker calls on a CPU: they give what the model gives, only where nobody would see that it is not asked."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.overrides import TorchFunctionMode

from gpt2_multi.pt import GPT2DoubleHeadsModel, GPT2LMHeadModel
from gpt2_multi.pt.attention import Attention
from gpt2_multi.pt.generation import cpu_kernels
from gpt2_multi.pt.layers import HAS_ONEDNN, QuantizedLinear
from tests.pt.generation.test_steering import CONFIG, MODELS, PROMPTS, flipped, generated, logits_of, make
from tests.support import fixtures
from tests.support.plain_loop import WAYS, plain

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN: the model is called at each step")


@pytest.fixture
def steps(monkeypatch):
    """How many tokens were read by each step that did not call the model; every loop packs."""
    seen, read = [], cpu_kernels.Kernels.read
    monkeypatch.setattr(cpu_kernels, "LEAST", 0)
    monkeypatch.setattr(cpu_kernels, "WORTHWHILE", 0)

    def counted(self, tokens, *given):
        seen.append(tokens.shape)
        return read(self, tokens, *given)

    monkeypatch.setattr(cpu_kernels.Kernels, "read", counted)
    return seen


def mapped(tmp_path):
    make().save_pretrained(tmp_path)
    return GPT2LMHeadModel.from_pretrained(tmp_path, mmap=True, param_dtype="float32")


def changed(**fields):
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG.replace(**fields))


def pruned():
    model = make().float()
    model.transformer.h[1].attn.prune([0])
    return model


KINDS = {
    "as it is": lambda path: make().float(),
    "mapped": mapped,
    "other fields": lambda path: changed(
        activation_function="gelu", tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True, n_inner=24
    ),
    "an activation that is not fused": lambda path: changed(activation_function="silu", scale_attn_weights=False),
    "pruned": lambda path: pruned(),
}


@pytest.mark.filterwarnings("ignore:top_k")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_model(kind, way, tmp_path, steps):
    model = KINDS[kind](tmp_path).eval()
    found = generated(model, PROMPTS, **WAYS[way])
    assert len(steps) >= 4 and found.tolist() == plain(logits_of(model), model.config, PROMPTS, **WAYS[way]).tolist()


@pytest.mark.parametrize("least", [0, 99])
def test_tokens_are_the_recorded_packed_and_not(least, steps, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LEAST", least)
    recorded = {name: torch.from_numpy(x.copy()) for name, x in fixtures.reference("lm").items()}
    model = GPT2LMHeadModel.from_pretrained(fixtures.folder("lm"))
    options = {"max_new_tokens": 20, "eos_token_id": None}
    found = model.generate(recorded["gen.input_ids"], recorded["in.mask_left"], **options)
    assert len(steps) == 19 and torch.equal(found, recorded["gen.greedy"])
    pair = GPT2DoubleHeadsModel(model.config).eval()
    pair.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(pair.generate(recorded["gen.input_ids"], recorded["in.mask_left"], **options), found)
    assert len(steps) == 38


@pytest.mark.parametrize("name", MODELS)
def test_who_steers_a_model_steers_its_steps(name, steps):
    model = MODELS[name]().float()
    assert generated(model, PROMPTS).tolist() == plain(logits_of(model), model.config, PROMPTS).tolist()
    assert not steps


def replaced(model):
    model.transformer.h[1].mlp.c_proj.forward = lambda x: x


def hooked(model):
    model.transformer.h[0].ln_2.register_forward_pre_hook(lambda *_: None)


def dropping(model):
    model.transformer.drop.train()


def eager(model):
    model.set_attn_implementation("eager")


def doubled(model):
    model.transformer.h.append(model.transformer.h[0])


def own_activation(model):
    model.transformer.h[0].mlp.act = nn.SiLU()


def own_layer(model):
    model.lm_head = type("Head", (nn.Linear,), {})(16, CONFIG.vocab_size, bias=False)


def striped(model):
    layer = model.transformer.h[0].attn.c_proj
    layer.weight = nn.Parameter(torch.randn(16, 32)[:, ::2])


def norm_for_dropout(model):
    model.transformer.h[0].mlp.dropout = nn.LayerNorm(16).eval()


def layer_for_norm(model):
    model.transformer.ln_f = nn.Linear(16, 16).eval()


def renormalised(model):
    model.transformer.wte.max_norm = 0.5  # by which each call changes the weights that it reads


def computed(model):
    layer = model.transformer.h[0].mlp.c_fc
    layer.weight = (layer._parameters.pop("weight") * 2).detach()


@pytest.mark.parametrize(
    "change",
    [
        replaced, hooked, dropping, eager, doubled, own_activation, own_layer, striped, norm_for_dropout,
        layer_for_norm, renormalised, computed,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
@torch.no_grad()
def test_a_model_that_somebody_changed_is_called(change):
    model = make().float()
    assert cpu_kernels.is_own(model)
    change(model)
    assert not cpu_kernels.is_own(model)


@torch.no_grad()
def test_a_model_that_is_loaded_in_a_dtype_is_as_it_was_made():
    loaded = GPT2LMHeadModel.from_pretrained("demo", dtype="float32")
    wider = GPT2LMHeadModel.from_pretrained("demo")
    wider.compute_dtype = torch.float64
    with torch.no_grad():
        assert cpu_kernels.is_own(loaded) and not cpu_kernels.is_own(wider)


@torch.no_grad()
def test_a_model_is_as_it_was_made_after_something_was_compiled(monkeypatch):
    torch.compile(nn.Linear(2, 2), backend="eager")(torch.zeros(1, 2))
    monkeypatch.setattr(nn.Module, "smart_apply", nn.Module.apply, raising=False)  # as transformers does
    assert cpu_kernels.is_own(make().float())
    monkeypatch.setattr(nn.Linear, "__call__", nn.Linear.__call__, raising=False)  # but this one is called
    assert not cpu_kernels.is_own(make().float())


@torch.no_grad()
def test_a_model_is_called_where_others_would_see_it(monkeypatch):
    model = make().float()

    class Seen(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_kernels.is_own(model)
    with Seen():
        assert not cpu_kernels.is_own(model)
    with torch.enable_grad():
        assert not cpu_kernels.is_own(model)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *given: None)
        assert not cpu_kernels.is_own(model)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not cpu_kernels.is_own(model)
    everywhere.remove()
    assert cpu_kernels.is_own(model) and not cpu_kernels.is_own(model.double())
    model.float()
    ways = [(nn.Linear, "forward"), (nn.Module, "__call__"), (Attention, "attend"), (GPT2LMHeadModel, "logits")]
    for cls, name in ways:
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, lambda self, *given: None)
            assert not cpu_kernels.is_own(model), name
    assert cpu_kernels.is_own(model)


def test_a_change_of_a_weight_between_two_calls_counts(steps):
    model = make().float()
    before = generated(model, PROMPTS)
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(-1)  # which no version counts
    after = generated(model, PROMPTS)
    assert after.tolist() == plain(logits_of(model), model.config, PROMPTS).tolist() != before.tolist()
    assert len(steps) == 10


@pytest.mark.parametrize("change", ["a weight", "a hook"])
def test_a_change_in_the_middle_of_a_stream_counts(change, steps):
    def changed(model):
        if change == "a weight":
            model.transformer.wte.weight.data.mul_(-1)
        else:
            model.register_forward_hook(flipped)

    def streamed(model):
        columns = model.stream_tokens(torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]), max_new_tokens=8, eos_token_id=None)
        for number, column in enumerate(columns):
            yield column.tolist()
            if number == 3:
                changed(model)

    found = list(streamed(make().float()))
    assert len(steps) == (7 if change == "a weight" else 3)
    assert found == list(streamed(make()))


def test_packed_weights_are_gone_after_generation(steps, monkeypatch):
    packed, kept, pack = [], [], torch.ops.mkldnn._reorder_linear_weight

    def watched(weight, rows):
        found = pack(weight, rows)
        packed.append(weakref.ref(found))
        return found

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", watched)
    trimmed = []
    monkeypatch.setattr("gpt2_multi.pt.generation.decoding.give_back", lambda: trimmed.append(len(alive())))

    def alive():
        return [one for one in packed if one() is not None]

    model = make().float()
    kept.append(model.generate(torch.tensor([PROMPTS[0]] * 2), max_new_tokens=4, return_dict_in_generate=True))
    gc.collect()
    assert len(packed) == 9 and not alive() and trimmed == [0]
    monkeypatch.setattr(cpu_kernels, "LEAST", 32)
    kept.append(model.generate(torch.tensor([PROMPTS[0]] * 2), max_new_tokens=4))
    monkeypatch.setattr(cpu_kernels, "LEAST", 0)
    model.double().generate(torch.tensor([PROMPTS[0]] * 2), max_new_tokens=4)
    assert len(packed) == 9  # neither for a few tokens nor in float64


def test_packing_pays_the_sooner_the_more_rows_there_are(tmp_path, monkeypatch):
    model, of_a_file = make().float(), mapped(tmp_path)
    least = [next(n for n in range(999) if cpu_kernels.are_worthwhile(model, rows, n)) for rows in (1, 2, 8, 64)]
    assert least == sorted(least, reverse=True) and least[0] > 100 and least[-1] > 32
    assert [cpu_kernels.are_worthwhile(of_a_file, rows, 999) for rows in (1, 2)] == [False, True]
    monkeypatch.setattr(cpu_kernels, "MOST", 999)
    assert not cpu_kernels.are_worthwhile(model, 8, 999)


def test_integers_in_another_order_are_packed_anew():
    layer = QuantizedLinear(64, 64)
    layer.weight.data.random_(-127, 128)
    before = layer.packed()
    assert layer.packed() is before
    words = layer.weight.data.view(torch.int64)
    words.copy_(words.flip(1))  # the sum of each row stays
    assert layer.packed() is not before
