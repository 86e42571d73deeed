"""The figures of docs/numerics.md: how far dtypes and caches move the logits of PyTorch, relative to the largest."""

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel
from gpt2_multi.pt.layers import project
from gpt2_multi.pt.model import MLP
from tests.core.parity.test_parity import run_oracle
from tests.support import fixtures

ORACLE_BOUNDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
CACHE_BOUNDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
IDS = fixtures.reference("lm")["in.input_ids"].copy()


@pytest.fixture(params=["sdpa", "eager"])
def load(request):
    """The recorded language model in a dtype, for each way to compute attention."""
    options = {"attn_implementation": request.param}
    return lambda dtype: GPT2LMHeadModel.from_pretrained(fixtures.folder("lm"), param_dtype=dtype, **options)


def relative(found, expected):
    found, expected = (np.asarray(logits, np.float64) for logits in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("dtype", ORACLE_BOUNDS)
@torch.no_grad()
def test_every_dtype_is_close_to_the_oracle(dtype, load):
    found = relative(load(dtype)(torch.from_numpy(IDS)).logits.double(), run_oracle("lm", {"input_ids": IDS})["logits"])
    print(f"{dtype}: {found:.1e}")
    assert found <= ORACLE_BOUNDS[dtype]


@pytest.mark.parametrize("dtype", CACHE_BOUNDS)
@pytest.mark.parametrize("kind", ["grown", "preallocated"])
@torch.no_grad()
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(dtype, kind, load):
    model, ids, steps = load(dtype), torch.from_numpy(IDS), []
    past = model.init_cache(*ids.shape) if kind == "preallocated" else None
    for step in ids.split(1, 1):
        out = model(step, past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits.double())
    found = relative(torch.cat(steps, 1), model(ids).logits.double())
    print(f"{dtype}, {kind}: {found:.1e}")
    assert found <= CACHE_BOUNDS[dtype]


def one_projection() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(96, 384), torch.randn(8, 32, 96)  # 9.4 million products


def calls_of_onednn(layer: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a projection goes to oneDNN; what it gives has to be what the layer gives."""
    calls = []
    real = torch.ops.mkldnn._linear_pointwise
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: (calls.append(1), real(*given))[1])
        found = project(layer, x)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-5)
    return len(calls)


def test_a_projection_is_multiplied_by_onednn_where_nobody_would_see_the_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = one_projection()
    with torch.no_grad():
        assert calls_of_onednn(layer, x, monkeypatch) == 1
        layer.weight[3, 5] += 1.0  # in place, which must count
        assert calls_of_onednn(layer, x, monkeypatch) == 1
        assert calls_of_onednn(nn.Linear(96, 384, bias=False), x, monkeypatch) == 1


def test_a_projection_has_the_derivatives_of_the_layer() -> None:
    layer, x = one_projection()
    x.requires_grad_()

    def derivatives(call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x, layer.weight, layer.bias]
        first = torch.autograd.grad(call(x)[:, ::2].square().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), inputs)]

    assert type(project(layer, x).grad_fn).__name__ == "ProductBackward"
    for found, expected in zip(derivatives(lambda x: project(layer, x)), derivatives(layer), strict=True):
        assert relative(found.detach(), expected.detach()) < 1e-5
    several = torch.randn(3, *layer(x).shape)
    of_many = (
        torch.autograd.grad(y, (x, *layer.parameters()), several, is_grads_batched=True)
        for y in (project(layer, x), layer(x))
    )
    for found, expected in zip(*of_many, strict=True):
        assert relative(found, expected) < 1e-5
    layer.requires_grad_(False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        found = project(layer, x)
    assert torch.autograd.grad(found.sum(), x)[0].allclose(layer.weight.sum(0), atol=1e-5)
    assert [each.shape for each in kept] == [layer.weight.shape]  # of a frozen layer, not what it was given


def test_two_projections_in_one_have_the_derivatives_of_their_layers() -> None:
    torch.manual_seed(0)
    mlp, x = MLP(GPT2Config(n_embd=64, n_head=2, resid_pdrop=0.0)), torch.randn(4, 32, 64, requires_grad=True)

    def derivatives(output: torch.Tensor) -> list[torch.Tensor]:
        inputs, loss = [x, *mlp.parameters()], output[:, ::2].square().sum()
        plain = torch.autograd.grad(loss, inputs, retain_graph=True)
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return [*plain, *first, *torch.autograd.grad(sum(each.square().sum() for each in first), inputs)]

    expected = mlp.c_proj(torch.nn.functional.gelu(mlp.c_fc(x), approximate="tanh"))
    for each, other in zip(derivatives(mlp(x)), derivatives(expected), strict=True):
        assert relative(each.detach(), other.detach()) < 1e-5
    assert type(mlp(x).grad_fn).__name__ == "PerceptronBackward"
    mlp.c_fc.register_forward_hook(lambda module, given, output: None)
    assert type(mlp(x).grad_fn).__name__ == "ProductBackward"


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_projection_is_the_layer_s_own_where_somebody_would(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = one_projection()
    backward = layer.register_full_backward_hook(lambda module, given, output: None)
    assert calls_of_onednn(layer, x, monkeypatch) == 0
    backward.remove()
    with torch.no_grad():
        assert calls_of_onednn(layer, x[0, :2], monkeypatch) == 0  # which is not worth it
        assert calls_of_onednn(layer.double(), x.double(), monkeypatch) == 0
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert project(layer, x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as flops:
            project(layer, x)
        assert flops.get_total_flops() == 2 * 8 * 32 * 96 * 384
        assert torch.func.vmap(lambda row: project(layer, row))(x).allclose(layer(x), atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "linear", lambda *given: None)
            assert project(layer, x) is None
        with torch.device("cpu"):  # a mode that sees each function which is called
            assert calls_of_onednn(layer, x, monkeypatch) == 0
        sparse = nn.Linear(96, 384).requires_grad_(False)
        sparse.weight = nn.Parameter(sparse.weight.to_sparse_csr(), requires_grad=False)
        assert calls_of_onednn(sparse, x, monkeypatch) == 0
        hook = layer.register_forward_hook(lambda module, given, output: output * 0)
        assert calls_of_onednn(layer, x, monkeypatch) == 0 and not project(layer, x).any()
        hook.remove()
        everywhere = nn.modules.module.register_module_forward_hook(lambda module, given, output: output * 0)
        assert not project(layer, x).any()
        everywhere.remove()
        layer.forward = lambda x: x  # type: ignore[method-assign]
        assert project(layer, x) is x
        del layer.forward
        prune.l1_unstructured(layer, "weight", 0.5)
        assert calls_of_onednn(layer, x, monkeypatch) == 0
        assert calls_of_onednn(torch.nn.utils.parametrizations.weight_norm(nn.Linear(96, 384)), x, monkeypatch) == 0
