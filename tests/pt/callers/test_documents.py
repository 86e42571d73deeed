"""Documents that stand in a row, and flash-attn: what each token sees, whatever computes it.

flash-attn runs on CUDA alone: a module with the same functions, whose mathematics is plain, stands in its place.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_multi import pt
from gpt2_multi.errors import InputError
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.pt import GPT2LMHeadModel, GPT2Model, layers
from gpt2_multi.pt import model as model_module
from gpt2_multi.pt.attention import kernels

NONE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIG = GPT2Config(
    n_layer=2, n_embd=24, n_head=3, vocab_size=50, n_positions=12, bos_token_id=1, eos_token_id=2, **NONE
)
LENGTHS = (5, 1, 12, 3)  # together more than n_positions
KINDS = ("sdpa", "eager", "flash_attention_2")


def dense(q: Any, k: Any, v: Any, dropout_p: float, softmax_scale: float | None, causal: bool) -> Any:
    """(T, H, D) and (S, H, D): a causal query sees the keys up to its own, which are counted from the end."""
    assert dropout_p == 0 and causal and softmax_scale is not None
    scores = torch.einsum("thd,shd->hts", q, k) * softmax_scale
    hidden = torch.ones(len(q), len(k)).triu(len(k) - len(q) + 1).bool()
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def flash_attn_func(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Any:
    assert q.dim() == 4 and q.stride(-1) == 1
    return torch.stack([dense(*row, dropout_p, softmax_scale, causal) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
) -> Any:  # fmt: skip
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert isinstance(max_seqlen_q, int) and max_seqlen_q == cu_seqlens_q.diff().max()
    assert isinstance(max_seqlen_k, int) and max_seqlen_k == cu_seqlens_k.diff().max()
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
    parts = [
        torch.tensor_split(x, c[1:-1].tolist()) for x, c in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    ]
    return torch.cat([dense(*run, dropout_p, softmax_scale, causal) for run in zip(*parts, strict=True)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-in's functions that were called."""
    module, found = ModuleType("flash_attn"), list[str]()
    module.__spec__ = torch.__spec__

    def noted(function: Any) -> Any:
        return lambda *args, **given: (found.append(function.__name__), function(*args, **given))[1]

    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(module, function.__name__, noted(function))
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(kernels, "HALVES", (torch.float64,))
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    return found


def made(kind: str = "sdpa", config: GPT2Config = CONFIG) -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config, param_dtype="float64", attn_implementation=kind)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.4, 0.4)
    return model.eval()


def texts(seed: int = 1) -> list[Any]:
    torch.manual_seed(seed)
    return [torch.randint(3, 50, (1, length)) for length in LENGTHS]


def row(parts: list[Any]) -> dict[str, Any]:
    return {
        "input_ids": torch.cat(parts, 1),
        "position_ids": torch.cat([torch.arange(x.shape[1]) for x in parts])[None],
    }


def labels(parts: list[Any]) -> Any:
    return torch.cat([F.pad(x[:, 1:], (1, 0), value=-100) for x in parts], 1)


def gradients(model: Any) -> list[Any]:
    found = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    return found


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_documents_in_a_row_are_those_alone(kind: str, recomputed: bool, calls: list[str]) -> None:
    """Logits, losses and gradients, in several rows too."""
    model, parts = made(kind).train(), texts()
    if recomputed:
        model.gradient_checkpointing_enable()
    alone = [model(x, use_cache=False).logits for x in parts]
    sum(F.cross_entropy(y[0, :-1], x[0, 1:], reduction="sum") for x, y in zip(parts, alone, strict=True)).backward()
    expected, wanted = torch.cat(alone, 1), gradients(model)
    calls.clear()
    output = model(**row(parts), labels=labels(parts), num_items_in_batch=1, use_cache=False)
    output.loss.backward()
    close(output.logits, expected)
    close(gradients(model), wanted)
    assert set(calls) == ({"flash_attn_varlen_func"} if kind == "flash_attention_2" else set())
    both = {name: torch.cat([x, x.roll(-sum(LENGTHS[:2]), 1)]) for name, x in row(parts).items()}
    close(model(**both, use_cache=False).logits[1], expected[0].roll(-sum(LENGTHS[:2]), 0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_kernel_computes_keeps_documents_apart_too(kind: str, calls: list[str]) -> None:
    model, parts = made(kind), texts()
    expected = model(**row(parts), use_cache=False).logits
    more = {"output_attentions": True}, {"head_mask": torch.ones(2, 3)}
    for options in more:
        output = model(**row(parts), use_cache=False, **options)
        close(output.logits, expected)
    upcast = made(kind, CONFIG.replace(reorder_and_upcast_attn=True))
    close(upcast(**row(parts), use_cache=False).logits, expected)
    probs = model(**row(parts), use_cache=False, output_attentions=True).attentions[0]
    assert not probs[..., LENGTHS[0] :, : LENGTHS[0]].any()


def test_a_compiled_call_keeps_documents_apart(calls: list[str]) -> None:
    for kind in ("sdpa", "flash_attention_2"):
        model, parts = made(kind), texts()
        compiled = torch.compile(lambda model=model, **given: model(**given, use_cache=False).logits, backend="eager")
        close(compiled(**row(parts)), model(**row(parts), use_cache=False).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [0, 3])
def test_a_mask_of_any_kind(kind: str, past: int, calls: list[str]) -> None:
    """Padding on the left, on the right, within, a row of nothing, with a cache and without."""
    model, reference = made(kind), made()
    ids = torch.randint(3, 50, (5, 8))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 6:], mask[2, 2:4], mask[3] = 0, 0, 0, 0
    found, expected = (goes_on(m, ids, mask, past) for m in (model, reference))
    seen = mask[:, past:].bool()
    close(found[seen], expected[seen])
    if kind == "flash_attention_2":
        assert "flash_attn_varlen_func" in calls


def goes_on(model: Any, ids: Any, mask: Any, past: int) -> Any:
    cache = model(ids[:, :past], attention_mask=mask[:, :past]).past_key_values if past else None
    return model(ids[:, past:], attention_mask=mask, past_key_values=cache).logits


def test_flash_generates_the_same_tokens(calls: list[str]) -> None:
    ids, mask = torch.randint(3, 50, (3, 5)), torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
    found, expected = (m.generate(ids, attention_mask=mask, max_new_tokens=6) for m in (made(KINDS[2]), made()))
    assert torch.equal(found, expected) and "flash_attn_varlen_func" in calls
    calls.clear()
    close(made(KINDS[2])(ids).logits, made()(ids).logits)
    assert calls == ["flash_attn_func"] * 2


@pytest.mark.parametrize("forced", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_sdpa_forced_to_a_backend(forced: Any) -> None:
    """Those that a CPU has; the others are for CUDA, and refuse with a sentence of PyTorch's own."""
    model, parts = made(), texts()
    expected = made("eager")(**row(parts), use_cache=False).logits
    mask = torch.tensor([[0] * 2 + [1] * 3])
    with sdpa_kernel(forced):
        close(model(**row(parts), use_cache=False).logits, expected)
        found = model(parts[0], attention_mask=mask).logits[:, 2:]
    close(found, made("eager")(parts[0], attention_mask=mask).logits[:, 2:])


def test_sdpa_forced_to_a_backend_of_cuda() -> None:
    if torch.cuda.is_available():
        model = made().cuda().half()
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            assert model(texts()[0].cuda()).logits.isfinite().all()
        return
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), pytest.raises(RuntimeError, match="No viable backend"):
        made()(texts()[0])


def collated(**options: Any) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorWithFlattening(**options)
    return dict(collate([{"input_ids": x[0].tolist()} for x in texts()], return_tensors="pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_flattening_collator_gives(kind: str, calls: list[str]) -> None:
    """All that it says of documents keeps them apart, without `use_cache`, and with a mask."""
    model, plain = made(kind), collated()
    expected = model(**row(texts()), labels=labels(texts()), use_cache=False)
    batch = collated(return_flash_attn_kwargs=True, return_seq_idx=True)
    close(model(**plain, use_cache=False).loss, expected.loss)
    close(model(**batch).loss, expected.loss)
    masked = model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    close(masked.logits, expected.logits)
    assert masked.past_key_values is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"position_ids": None}, "position_ids: expected beside where documents begin, found None"),
        ({"use_cache": True}, "use_cache: documents in a row have no cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 21])}, r"cu_seq_lens_q: expected \[0, 5, 6, 18, 21\] by position_ids"),
        ({"max_length_k": 11}, "max_length_k: expected 12 by position_ids, found 11"),
        ({"seq_idx": torch.zeros(1, 21, dtype=torch.int32)}, "seq_idx: found"),
        ({"seq_idx": torch.zeros(1, 20, dtype=torch.int32)}, r"seq_idx: expected shape \(1, 21\)"),
    ],
)
def test_documents_that_are_said_otherwise_are_a_sentence(change: dict[str, Any], expected: str) -> None:
    batch = collated(return_flash_attn_kwargs=True, return_seq_idx=True)
    with pytest.raises(InputError, match=expected):
        made()(**batch | change)


def test_as_in_transformers() -> None:
    """Apart without mask and cache; with either a token sees all before it, there without a word and here with one."""
    transformers = pytest.importorskip("transformers")
    ours, given = made(), row(texts())
    own = {name: x for name, x in CONFIG.to_dict().items() if name.startswith(("n_", "vocab", "bos", "eos")) and x}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**own)).double().eval()
    state = {name: x.t() if is_conv(name) else x for name, x in ours.transformer.state_dict().items()}
    theirs.transformer.load_state_dict(state)
    for kind in ("sdpa", "eager"):
        theirs.set_attn_implementation(kind)
        close(ours(**given, use_cache=False).logits, theirs(**given, use_cache=False).logits)
        odd = given | {"position_ids": given["position_ids"].flip(1)}
        close(ours(**odd, use_cache=False).logits, theirs(**odd, use_cache=False).logits)
        for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, 21)}):
            with pytest.warns(UserWarning, match="position_ids: begin again within a row"):
                found = ours(**given, **more).logits
            close(found, theirs(**given, **more).logits)
            assert (found - ours(**given, use_cache=False).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ForQuestionAnswering", "ForTokenClassification"])
def test_heads_see_what_they_see_in_transformers(kind: str) -> None:
    """With its default, and with `use_cache=False`, of which the first gives no cache back either."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    own = {name: x for name, x in CONFIG.to_dict().items() if name.startswith(("n_", "vocab", "bos", "eos")) and x}
    theirs = getattr(transformers, f"GPT2{kind}")(transformers.GPT2Config(**own)).double().eval()
    ours = getattr(pt, f"GPT2{kind}").from_pretrained(
        None, config=CONFIG.replace(num_labels=2), state_dict=theirs.state_dict(), dtype="float64"
    )
    given = row(texts())
    with pytest.warns(UserWarning, match="position_ids: begin again within a row"):
        mixed = ours(**given)
    for found, more in ((mixed, {}), (ours(**given, use_cache=False), {"use_cache": False})):
        for x, y in zip(found.to_tuple(), theirs(**given, **more).to_tuple(), strict=False):
            close(x, y)
    assert (mixed[0] - found[0]).abs().max() > 1e-3


def test_the_first_step_on_cuda_says_that_documents_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no step waits for values: one does, of the two that have a mask or a cache."""
    for module in (layers, model_module):
        monkeypatch.setattr(module, "is_concrete", lambda x: False)
    given = row(texts())
    for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones(1, 21)}):
        ours = made()
        with pytest.warns(UserWarning, match="position_ids: begin again within a row"):
            ours(**given, **more)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours(**given, **more)
            made()(**given, use_cache=False)
            made()(given["input_ids"][:, :12], position_ids=torch.arange(12)[None], use_cache=True)


def is_conv(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def test_positions_of_padding_are_no_documents() -> None:
    """As by loops of transformers, whose padding has the position 1 (or 0)."""
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    ids = texts()[0]
    found, expected = made()(ids, attention_mask=mask, position_ids=places), made()(ids, attention_mask=mask)
    close(found.logits[:, 2:], expected.logits[:, 2:])


@pytest.mark.parametrize(
    ("dtype", "patched", "config", "expected"),
    [
        ("float32", {}, CONFIG, "dtype: flash-attn computes in float16 and bfloat16, found torch.float32"),
        ("bfloat16", {}, CONFIG, "device: flash-attn computes on cuda, found cpu"),
        (
            "bfloat16",
            {"DEVICES": ("cpu",), "WIDEST": 7},
            CONFIG,
            "n_head: flash-attn computes heads up to 7 wide, found 8",
        ),
    ],
)
def test_what_flash_attn_cannot_compute_is_a_sentence(
    dtype: str, patched: dict[str, Any], config: GPT2Config, expected: str, calls: list[str], monkeypatch: Any
) -> None:
    for name, value in ({"HALVES": (torch.float16, torch.bfloat16), "DEVICES": ("cuda",)} | patched).items():
        monkeypatch.setattr(kernels, name, value)
    model = GPT2Model(config, param_dtype=dtype, attn_implementation="flash_attention_2")
    with pytest.raises(InputError, match=expected):
        model(texts()[0])
    assert not calls
