"""Steps by quicker calls on a CPU: they give what the model gives, only where nobody would see that it is not asked."""

import copy
import gc
import os
import pickle
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.overrides import TorchFunctionMode

from gpt2_multi.pt import GPT2DoubleHeadsModel, GPT2LMHeadModel
from gpt2_multi.pt.attention import Attention
from gpt2_multi.pt.generation import cpu_kernels, packing
from gpt2_multi.pt.layers import HAS_ONEDNN, QuantizedLinear
from tests.pt.generation.test_steering import CONFIG, MODELS, PROMPTS, flipped, generated, logits_of, make
from tests.support import fixtures
from tests.support.plain_loop import WAYS, plain

pytestmark = pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN: the model is called at each step")


@pytest.fixture
def steps(monkeypatch):
    """How many tokens were read by each step that did not call the model; every loop packs."""
    seen, read = [], cpu_kernels.Kernels.read
    monkeypatch.setattr(packing, "LEAST", 0)
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
    monkeypatch.setattr(packing, "LEAST", least)
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


HAS_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN without bfloat16 here: the model is called")


@bfloat16
@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_by_the_model(steps, monkeypatch):
    exact, model = (GPT2LMHeadModel.from_pretrained("demo", param_dtype=dtype) for dtype in ("float32", "bfloat16"))
    ids = torch.arange(5, 53).view(4, 12)
    options = {"max_new_tokens": 24, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    quick = model.generate(ids, **options)
    assert len(steps) == 23 and quick.logits[-1].dtype == torch.bfloat16
    monkeypatch.setattr("gpt2_multi.pt.generation.decoding.is_own", lambda model: False)
    ordinary = model.generate(ids, **options)
    assert len(steps) == 23
    errors = []
    for found in (quick, ordinary):
        whole = exact(found.sequences).logits[:, 11:-1]
        errors.append((torch.stack(found.logits, 1).float() - whole).abs())
    assert errors[0].mean() < 1.1 * errors[1].mean() and errors[0].max() < 1.5 * errors[1].max()
    assert quick.sequences.equal(ordinary.sequences)


@bfloat16
@torch.no_grad()
def test_bfloat16_is_for_whole_models_of_it():
    model = make().bfloat16()
    assert cpu_kernels.is_own(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_kernels.is_own(model)
    model.transformer.ln_f.float()
    assert not cpu_kernels.is_own(model)
    integers = GPT2LMHeadModel.from_pretrained("demo", quantization="int8")
    assert cpu_kernels.is_own(integers) and not cpu_kernels.is_own(integers.bfloat16())
    assert not cpu_kernels.is_own(make().half())


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


def by_data(model):
    model.transformer.h[1].mlp.c_fc.weight.data.mul_(-1)  # which no version counts


def by_order(model):
    weight = model.transformer.h[0].attn.c_attn.weight.data
    weight.copy_(weight.flip(1))  # the sum of each row stays


def by_load_state_dict(model):
    model.load_state_dict({name: -x for name, x in model.state_dict().items()})


def by_assignment(model):
    model.lm_head.weight = model.transformer.wte.weight = nn.Parameter(-model.transformer.wte.weight.detach())


def by_layer(model):
    layer = nn.Linear(16, 48)
    model.transformer.h[0].attn.c_attn = layer.eval()


def by_optimizer(model):
    loss = model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 9.0).step()


CHANGES = [by_data, by_order, by_load_state_dict, by_assignment, by_layer, by_optimizer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_a_weight_between_two_calls_counts(change, steps):
    model = make().float()
    before = generated(model, PROMPTS)
    change(model)
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


@pytest.fixture
def packs(steps, monkeypatch):
    """The weights that were packed."""
    found, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda weight: found.append(weight) or pack(weight))
    return found


def test_packed_weights_serve_the_next_generation(packs):
    model = make().float()
    first = generated(model, PROMPTS)
    assert len(packs) == 9 and generated(model, PROMPTS).tolist() == first.tolist() and len(packs) == 9
    by_data(model)
    generated(model, PROMPTS)
    assert len(packs) == 10  # the one that is another
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert generated(twin, PROMPTS).tolist() == generated(model, PROMPTS).tolist() and len(packs) == 19
    generated(model.double(), PROMPTS)
    assert len(packs) == 19


def test_packing_pays_the_sooner_the_more_is_asked_for(steps, monkeypatch):
    monkeypatch.setattr(packing, "LEAST", 32)
    model = make().float()

    def is_enough(rows, tokens):
        packing._KEPT.pop(model, None)
        return packing.borrow(model, rows, tokens) is not None

    least = [next(n for n in range(999) if is_enough(rows, n)) for rows in (1, 2, 64)]
    assert least == sorted(least, reverse=True) and least[0] > 63 and least[-1] > 32
    packing._KEPT.pop(model)
    assert [packing.borrow(model, 1, 20) is not None for _ in range(4)] == [False, False, False, True]
    monkeypatch.setattr(packing, "IDLE", 0)
    assert packing.borrow(model, 1, 20) is None
    monkeypatch.setattr(packing, "MOST", 999)
    assert packing.borrow(model, 8, 999) is None


def test_threads_share_what_is_packed(packs):
    model, found = make().float(), []
    before = generated(model, PROMPTS)
    by_data(model)  # each finds that, and one packs
    threads = [threading.Thread(target=lambda: found.append(generated(model, PROMPTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(x.tolist() == found[0].tolist() != before.tolist() for x in found)
    assert len(packs) == 10


def resident() -> int:
    """The bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="a system that does not tell its memory there")
def test_the_memory_of_packed_weights_comes_back(packs, monkeypatch):
    model = GPT2LMHeadModel(CONFIG.replace(n_embd=1024, n_layer=2, vocab_size=5000, n_head=8)).eval()  # 121 MB
    size, call = sum(x.nbytes for x in model.parameters()), {"max_new_tokens": 3, "eos_token_id": None}
    prompts = torch.tensor([[1, 2]] * 2)
    monkeypatch.setattr(packing, "LEAST", 999)
    model.generate(prompts, **call)  # whatever else a first call takes
    before = resident()
    monkeypatch.setattr(packing, "LEAST", 0)
    model.generate(prompts, **call)
    copies = packing._KEPT[model]
    assert len(packs) == 9 and resident() - before > 0.8 * size
    monkeypatch.setattr(packing, "IDLE", 0.01)
    model.generate(prompts, **call)
    copies.timer.join(60)
    assert not copies.weights and resident() - before < 0.2 * size
    model.generate(prompts, **call)
    packs.clear()
    del model
    gc.collect()
    copies.timer.join(60)
    assert resident() - before < -0.8 * size  # the model's own, too


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="a system without forks")
def test_a_forked_process_begins_without_copies(packs):
    model = make().float()
    generated(model, PROMPTS)
    assert model in packing._KEPT
    packing._LOCK.acquire()  # as before a fork
    packing.forget()
    assert model not in packing._KEPT and packing._LOCK.acquire(blocking=False)
    packing._LOCK.release()


def test_integers_in_another_order_are_packed_anew(packs):
    layer = QuantizedLinear(64, 64)
    layer.weight.data.random_(-127, 128)
    loan = packing.Loan(packing.Copies())
    before = loan.packed(layer)
    assert loan.packed(layer) is before
    words = layer.weight.data.view(torch.int64)
    words.copy_(words.flip(1))  # the sum of each row stays
    assert loan.packed(layer) is not before
