"""`gpt2-multi plan`: bytes on paper beside those that a model has, and what cannot be shared is a sentence."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2_multi.app.doctor.memory import Job, needed
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import FSDP, TENSOR
from tests.app.conftest import good, needs_pt, refusal

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES: dict[str, Any] = dict(n_layer=3, n_embd=64, n_head=4, vocab_size=300, n_positions=64, **NO_DROPOUT)


def test_a_published_model_on_several_meshes() -> None:
    args = ["plan", "gpt2-xl", "--mesh", "data=1", "--mesh", "fsdp=8", "--mesh", "data=2,fsdp=2,tensor=5"]
    report = json.loads(good(*args, "--dtype", "bfloat16", "--json"))
    one, fsdp, mixed = report["plans"]
    assert report["parameters"] == 1_557_611_200 and [x["devices"] for x in report["plans"]] == [1, 8, 20]
    assert one["training"]["weights"] * 2 == one["training"]["optimizer"] == 8 * 1_557_611_200
    assert 1 <= 8 * fsdp["training"]["weights"] / one["training"]["weights"] < 1.001  # not all divides by eight
    assert fsdp["generation"]["cache"] * 8 == one["generation"]["cache"] == 2 * 48 * 8 * 1024 * 1600 * 2
    assert mixed["generation"]["cache"] * 20 == one["generation"]["cache"]
    assert mixed["training"]["total"] == sum(v for k, v in mixed["training"].items() if k != "total")
    text = good(*args)
    assert "data=2,fsdp=2,tensor=5" in text and "activations with checkpointing" in text


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys; from gpt2_multi.app.doctor import memory, plan; "
        "print({'torch', 'tensorflow', 'jax', 'numpy.random'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch" not in found and "jax" not in found and "tensorflow" not in found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mesh", "tensor=2"], "h.0.attn.c_attn.weight: the axis 'head' has 25 entries, which 2 devices of the mesh"),
        (["--mesh", "fsdp=3", "--batch-size", "6"], "wte.weight: the axis 'embed' has 1600 entries, which 3 devices"),
        (["--mesh", "data=3"], "batch_size: expected a number of rows that 3 devices share equally, found 8"),
        (["--mesh", "dat=2"], "mesh: expected the axes data, fsdp, tensor, found 'dat'; did you mean 'data'?"),
        (["--mesh", "data=two"], "mesh: expected a positive number for 'data', found 'two'"),
        (["--mesh", "fsdp=2", "--backend", "tf"], "mesh: TensorFlow has the whole model on each device"),
        (["--rules", "heads=tensor"], "rules: expected named axes among vocab, position, embed"),
        (["--rules", "head=data"], "rules: expected mesh axes among fsdp, tensor, found 'data'"),
        (["--rules", "vocab=fsdp,embed=fsdp"], "rules: 'vocab' and 'embed' are both cut over 'fsdp', but wte.weight"),
        (["--rules", "head"], "rules: expected pairs such as embed=fsdp, with commas between, found 'head'"),
        (["--length", "1025"], "1025 tokens are more than n_positions 1024"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(options: list[str], expected: str) -> None:
    assert refusal("plan", "gpt2-xl", *options).startswith(expected)


def test_rules_that_leave_heads_whole_divide_the_rest() -> None:
    job = Job(GPT2Config.from_archive("gpt2-xl"), rules={"embed": "fsdp", "mlp": "tensor"})
    whole, cut = needed(job, ""), needed(job, "tensor=2")
    assert 0.5 < cut.training["weights"] / whole.training["weights"] < 0.75
    assert cut.generation["cache"] == whole.generation["cache"]


def test_logits_are_those_of_a_chunk_unless_words_are_cut() -> None:
    """As `learns_in_chunks` of tests/pt/callers/test_sharding.py sees it of a model that is cut."""
    job = Job(GPT2Config(**SIZES), length=64)
    words = Job(GPT2Config(**SIZES), length=64, rules={**job.rules, "vocab": "tensor"})
    whole, every = needed(job, "").training["logits"], 8 * 64 * 300 * 4
    assert whole == 2 * every and needed(job, "data=2,fsdp=2,tensor=2").training["logits"] == whole / 4
    assert needed(words, "fsdp=4").training["logits"] == whole / 4
    assert needed(words, "tensor=2").training["logits"] == 3 * every


def test_flax_leaves_whole_what_no_rule_names() -> None:
    job = Job(GPT2Config(**SIZES), length=64, rules={"head": "tensor"})
    pt, flax = (needed(Job(**{**vars(job), "backend": name}), "fsdp=4").training["weights"] for name in ("pt", "flax"))
    assert flax == needed(job, "").training["weights"] and flax / 4 <= pt < flax / 3.7


@needs_pt
@pytest.mark.parametrize("rules", [FSDP, FSDP | TENSOR, TENSOR, {"mlp": "fsdp"}])
def test_each_process_has_what_sharding_gives_it(rules: dict[str, str]) -> None:
    from gpt2_multi.pt.parameters.sharding import cuts

    job, mesh = Job(GPT2Config(**SIZES), length=64, rules=rules), {"data": 1, "fsdp": 4, "tensor": 2}
    parts = sum(math.prod(cut.part(mesh)) for cut in cuts(job.config, rules).values())
    assert needed(job, "fsdp=4,tensor=2").training["weights"] == 4 * parts


@needs_pt
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_moments_are_the_bytes_of_a_model(dtype: str) -> None:
    import torch

    from gpt2_multi.pt import GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**SIZES), param_dtype=dtype)
    optimizer, ids = torch.optim.AdamW(model.parameters()), torch.arange(64).view(2, 32)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    found = needed(Job(model.config, 2, 32, dtype, dtype), "").training
    grads = sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)
    moments = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert (found["weights"], found["gradients"]) == (model.get_memory_footprint(), grads)
    assert found["optimizer"] == moments and found["gathered or cast"] == 0


@needs_pt
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "checkpointing", "more"),
    [
        ("float64", "float64", False, {}),
        ("bfloat16", "bfloat16", False, {"n_inner": 96}),
        ("bfloat16", "bfloat16", True, {}),
        ("bfloat16", "float32", False, {}),  # whose copies of parameters are kept too
    ],
)
def test_activations_are_what_autograd_saves(
    dtype: str, param_dtype: str, checkpointing: bool, more: dict[str, int]
) -> None:
    from gpt2_multi.pt import GPT2LMHeadModel

    config = GPT2Config(**{**SIZES, **more})
    model = GPT2LMHeadModel(config, dtype=dtype, param_dtype=param_dtype).train()
    found = needed(Job(config, 4, 64, dtype, param_dtype, checkpointing=checkpointing), "").training
    expected = found["activations"] + found["gathered or cast"]
    if checkpointing:  # all of one block is there when it is computed again, in the backward pass
        model.gradient_checkpointing_enable()
        whole = needed(Job(config, 4, 64, dtype, param_dtype), "").training["activations"]
        ends = 2 * 4 * 64 * config.n_embd * 2
        expected -= (whole - ends) // config.n_layer
    logarithms = 4 * 64 * config.vocab_size * (8 if dtype == "float64" else 4)
    assert math.isclose(saved(model) - logarithms, expected, rel_tol=0.03)


def saved(model: Any) -> int:
    """The bytes that autograd saves for the backward pass, without parameters."""
    import torch

    ids = torch.randint(0, 300, (4, 64))
    own, seen = {x.untyped_storage().data_ptr() for x in model.parameters()}, {}

    def pack(x: Any) -> Any:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


def test_a_folder_is_planned_by_its_config(tiny: Path) -> None:
    report = json.loads(good("plan", tiny, "--length", "4", "--json"))
    assert report["length"] == 4 and report["plans"][0]["devices"] == 1
