"""`gpt2-multi plan`: bytes on paper beside those that a model has, and what cannot be shared is a sentence."""

from __future__ import annotations

import json
import math
import re
import shlex
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
    cache = 2 * 48 * 8 * 1024 * 1600 * 2  # devices of `fsdp` write the same rows
    assert fsdp["generation"]["cache"] == one["generation"]["cache"] == mixed["generation"]["cache"] * 10 == cache
    assert mixed["training"]["total"] == sum(v for k, v in mixed["training"].items() if k != "total")
    text = good(*args)
    assert "data=2,fsdp=2,tensor=5" in text and "training with checkpointing" in text


@pytest.mark.parametrize(("param_dtype", "stored"), [("float32", 4), ("bfloat16", 2)])
def test_gpt2_xl_on_two_devices_by_hand(param_dtype: str, stored: int) -> None:
    found = needed(Job(GPT2Config.from_archive("gpt2-xl"), dtype="bfloat16", param_dtype=param_dtype), "fsdp=2")
    odd = 48 * 800  # of the biases of queries, keys and values one device has two of three
    own = 1_557_611_200 // 2 + odd
    block, embeddings = 12 * 1600**2 + 13 * 1600, (50257 + 1024 + 2) * 1600  # numbers
    kept = 2 * 16 * 1600 + 4 * 25 + 16 + 2 * 1600  # bytes of a token in a block: (.., E), sums, statistics, dropout
    token = 48 * kept + (2 * 2 + 1) * 1600 + 8
    assert found.uses["training"] == {
        "weights": own * stored, "gradients": own * stored, "optimizer": 2 * own * stored,
        "gathered or cast": (embeddings + 2 * block) * 2, "activations": 4096 * token,
        "logits": 2 * 4096 * 50257 * 4,
    }  # fmt: skip
    difference = found.totals["training"] - found.totals["training with checkpointing"]
    assert difference == 4096 * (47 * kept - 48 * 2 * 1600)
    assert found.uses["generation"]["gathered"] == found.uses["training"]["gathered or cast"]


def test_what_fits_is_said_of_each_mesh() -> None:
    args = ["plan", "gpt2-xl", "--mesh", "data=1", "--mesh", "fsdp=2", "--dtype", "bfloat16"]
    report = json.loads(good(*args, "--memory", "24GB", "--json"))
    no, yes = False, True
    expected = [(no, no, yes), (no, yes, yes)]  # to train, to train with checkpointing, to generate
    assert [tuple(x["fits"].values()) for x in report["plans"]] == expected and report["memory"] == 24 * 10**9
    shown = [line.split()[-2:] for line in good(*args, "--memory", "24 GB").splitlines() if "fits in 24 GB" in line]
    assert shown == [["no", "no"], ["no", "yes"], ["yes", "yes"]]
    roomy = json.loads(good(*args, "--memory", "24GiB", "--json"))["plans"][1]
    assert roomy["fits"]["training"] and 24e9 < roomy["training"]["total"] < 24 * 2**30


def test_no_digit_is_cut_where_a_table_is_wide() -> None:
    meshes = [f"--mesh=data={2**n},fsdp=2,tensor=5" for n in range(12)]
    text = good("plan", "gpt2-xl", "--batch-size", "4096", *meshes)
    totals = json.loads(good("plan", "gpt2-xl", "--batch-size", "4096", *meshes, "--json"))["plans"]
    assert all(f" {plan['training']['total'] / 1e6:,.1f} " in text for plan in totals) and "…" not in text


def test_sizes_are_planned_as_train_takes_them_and_a_folder_comes_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads(good("plan", "n_layer=2,n_embd=64,n_head=4", "--json"))["parameters"] == 3_382_080
    assert json.loads(good("plan", "openai-community/gpt2", "--json"))["parameters"] == 124_439_808
    (tmp_path / "gpt2").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    assert json.loads(good("plan", "gpt2", "--json"))["length"] == 64


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "a quantized model"),
        ({"quantization_config": {"quant_method": "gpt2-multi", "bits": 8}}, "a quantized model"),
        ({"add_cross_attention": True}, "cross-attention"),
    ],
)
def test_what_a_folder_has_that_cannot_be_planned(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **settings}))
    assert refusal("plan", tmp_path) == f"{kind} cannot be planned; plan a model of the same sizes without it"


def test_the_page_has_the_figures_of_its_command() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "large.md").read_text("utf-8").partition("## On paper")[2]
    lines = page.partition("How it counts")[0].splitlines()
    command = next(line for line in lines if line.startswith("gpt2-multi plan"))
    printed = [re.split(r" {2,}", line.strip()) for line in good(*shlex.split(command)[1:]).splitlines()]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row for row in printed if len(row) == 4] == told and len(told) == 15


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
        (["--mesh", "data=8,data=2"], "mesh: expected each axis once, found 'data=8,data=2'"),
        (["--rules", "head=data"], "rules: 'head' is to be cut over the mesh axis 'data', expected fsdp or tensor"),
        (["--rules", "head=data", "--backend", "flax"], "rules: expected mesh axes among fsdp, tensor, found 'data'"),
        (["--rules", "embed=tensor"], "rules: 'embed' is to be cut over the mesh axis 'tensor', expected fsdp"),
        (["--rules", "mlp=tensor", "--mesh", "fsdp=2"], "rules: nothing is cut over 'fsdp', of which the mesh has 2"),
        (["--rules", "mlp=fsdp,mlp=tensor"], "rules: expected each axis once, found 'mlp=fsdp,mlp=tensor'"),
        (["--memory", "much"], "memory: expected bytes or a size such as \"5GB\", found 'much'"),
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
    assert 0.5 < cut.uses["training"]["weights"] / whole.uses["training"]["weights"] < 0.75
    assert cut.uses["generation"]["cache"] == whole.uses["generation"]["cache"]


def test_logits_are_those_of_a_chunk_unless_words_are_cut() -> None:
    """As `learns_in_chunks` of tests/pt/callers/test_sharding.py sees it of a model that is cut."""
    job = Job(GPT2Config(**SIZES), length=64)
    words = Job(GPT2Config(**SIZES), length=64, rules={**job.rules, "vocab": "tensor"})
    whole, every = needed(job, "").uses["training"]["logits"], 8 * 64 * 300 * 4
    assert whole == 2 * every and needed(job, "data=2,fsdp=2,tensor=2").uses["training"]["logits"] == whole / 4
    assert needed(words, "fsdp=4").uses["training"]["logits"] == whole / 4
    assert needed(words, "tensor=2").uses["training"]["logits"] == 3 * every


def test_flax_leaves_whole_what_no_rule_names() -> None:
    job = Job(GPT2Config(**SIZES), length=64, rules={"position": "fsdp"})
    pt, flax = (
        needed(Job(**{**vars(job), "backend": name}), "fsdp=4").uses["training"]["weights"] for name in ("pt", "flax")
    )
    assert flax == needed(job, "").uses["training"]["weights"] - 64 * 64 * 3 and flax / 4 <= pt < flax / 3.5


@needs_pt
@pytest.mark.parametrize("rules", [FSDP | TENSOR, TENSOR | {"position": "fsdp"}, {"mlp": "fsdp", "head": "tensor"}])
def test_each_process_has_what_sharding_gives_it(rules: dict[str, str]) -> None:
    from gpt2_multi.pt.parameters.sharding import cuts

    job, mesh = Job(GPT2Config(**SIZES), length=64, rules=rules), {"data": 1, "fsdp": 4, "tensor": 2}
    parts = sum(math.prod(cut.part(mesh)) for cut in cuts(job.config, rules).values())
    assert needed(job, "fsdp=4,tensor=2").uses["training"]["weights"] == 4 * parts


@needs_pt
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_moments_are_the_bytes_of_a_model(dtype: str) -> None:
    import torch

    from gpt2_multi.pt import GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**SIZES), param_dtype=dtype)
    optimizer, ids = torch.optim.AdamW(model.parameters()), torch.arange(64).view(2, 32)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    found = needed(Job(model.config, 2, 32, dtype, dtype), "").uses["training"]
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
        ("bfloat16", "float32", False, {}),  # whose copies of parameters are kept too,
        ("bfloat16", "float32", True, {}),  # or those of no block
    ],
)
def test_activations_are_what_autograd_saves(
    dtype: str, param_dtype: str, checkpointing: bool, more: dict[str, int]
) -> None:
    from gpt2_multi.pt import GPT2LMHeadModel

    config = GPT2Config(**{**SIZES, **more})
    model = GPT2LMHeadModel(config, dtype=dtype, param_dtype=param_dtype).train()
    uses = needed(Job(config, 4, 64, dtype, param_dtype), "").uses
    found = uses["training with checkpointing" if checkpointing else "training"]
    expected = found["activations"] + found["gathered or cast"]
    if checkpointing:  # all of one block is there when it is computed again, in the backward pass
        model.gradient_checkpointing_enable()
        ends, block = 2 * 4 * 64 * config.n_embd * 2, sum(x.numel() for x in model.transformer.h[0].parameters())
        expected -= (uses["training"]["activations"] - ends) // config.n_layer
        expected -= 2 * block * (dtype != param_dtype)
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
