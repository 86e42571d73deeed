"""Wrappers that split a model over two processes, or keep it elsewhere: FSDP, DDP, DTensor, accelerate's offload.

Two processes run all cases, once; a test looks at what the first has found.
"""

import faulthandler
import json
import os
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gpt2_multi import GPT2Config, GPT2Tokenizer, pt
from gpt2_multi.pt.model import GPT2Block

CONFIG = GPT2Config(
    vocab_size=1024, n_positions=24, n_embd=16, n_layer=2, n_head=2, n_inner=32, num_labels=4, initializer_range=0.3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
IDS = torch.tensor([[5, 9, 5, 9, 7], [1, 1002, 3, 4, 5]])
STATES = torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16)
STEPS = {"max_new_tokens": 4, "eos_token_id": None}
GATHERED = ColwiseParallel(output_layouts=Replicate())
ROWS = partial(RowwiseParallel, input_layouts=Replicate())


def make(cls=pt.GPT2LMHeadModel, folder=None, **options):
    """The same weights in every process; loaded, as most models that somebody splits are."""
    if folder is not None:
        return pt.GPT2LMHeadModel.from_pretrained(folder, **options)
    torch.manual_seed(0)
    return cls(CONFIG.replace(add_cross_attention=cls is pt.GPT2LMHeadModel)).eval()


def trained(model):
    """The loss after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    return float(model(IDS, labels=IDS).loss.detach())


def generated(model, **options):
    return model.generate(IDS, **STEPS | options).tolist()


def logits(model, **given):
    return model(IDS, **given).logits.tolist()


def planned(model, plan):
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def sharded(model, **policy):
    for part in (*model.transformer.h, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)), mp_policy=MixedPrecisionPolicy(**policy))
    return model


def wrapped(model):
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={GPT2Block})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def split(name, plan):
    """A plan for the body's first block, or for what is not in it."""
    return {f"transformer.h.0.{name}" if "." in name else name: plan}


def fsdp2_saves(folder):
    sharded(make(folder=folder)).save_pretrained(folder / "saved", max_shard_size="20KB")
    dist.barrier()
    model = make(folder=folder / "saved")
    assert model.config.architectures == ["GPT2LMHeadModel"], "fully_shard gives the class another name"
    return logits(model)


def fsdp2_saves_what_the_first_has(folder):
    """As programs of accelerate do, whose state of a cut model is whole in the main process, and empty in others."""
    model, main = sharded(make(folder=folder)), dist.get_rank() == 0
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    model.save_pretrained(folder / "first", is_main_process=main, state_dict=state)
    dist.barrier()
    return logits(make(folder=folder / "first"))


def fsdp2_keeps_its_state(folder):
    model, other = sharded(make(folder=folder)), sharded(make(pt.GPT2LMHeadModel, folder))
    with torch.no_grad():
        other.lm_head.weight.mul_(0)
    other.load_state_dict(model.state_dict())
    assert "lm_head.weight" not in model.state_dict() and other.lm_head.weight is other.transformer.wte.weight
    return logits(other)


def fsdp1_keeps_its_state(folder):
    model = wrapped(make(folder=folder))
    model.load_state_dict(model.state_dict())
    return trained(model)


def ddp_trains(folder):
    model = torch.nn.parallel.DistributedDataParallel(make(folder=folder), find_unused_parameters=True)
    assert not [name for name in model.state_dict() if "lm_head" in name]
    return trained(model)


def retied(folder):
    model = planned(make(folder=folder), {"transformer.wte": ROWS(), "lm_head": GATHERED})
    model.tie_weights()
    return trained(model)


def text(model):
    return model.generate("ROMEO", tokenizer=GPT2Tokenizer.from_pretrained("demo"), **STEPS)


CASES = {  # what two processes do with a loaded model -> a model of one process does the same
    "fsdp2 logits": (lambda folder: logits(sharded(make(folder=folder))), logits),
    "fsdp2 generates": (lambda folder: generated(sharded(make(folder=folder))), generated),
    "fsdp2 beams": (
        lambda folder: generated(sharded(make(folder=folder)), num_beams=3), partial(generated, num_beams=3),
    ),
    "fsdp2 texts": (lambda folder: text(sharded(make(folder=folder))), text),
    "fsdp2 trains": (lambda folder: trained(sharded(make(folder=folder))), trained),
    "fsdp2 saves": (fsdp2_saves, logits),
    "fsdp2 saves what the first has": (fsdp2_saves_what_the_first_has, logits),
    "fsdp2 keeps its state": (fsdp2_keeps_its_state, logits),
    "fsdp1 trains": (lambda folder: trained(wrapped(make(folder=folder))), trained),
    "fsdp1 keeps its state": (fsdp1_keeps_its_state, trained),
    "ddp trains": (ddp_trains, trained),
    "split mlp": (
        lambda folder: logits(planned(make(folder=folder), {
            "transformer.h.*.mlp.c_fc": ColwiseParallel(), "transformer.h.*.mlp.c_proj": RowwiseParallel(),
        })), logits,
    ),
    "split c_attn, gathered": (
        lambda folder: logits(planned(make(folder=folder), split("attn.c_attn", GATHERED))), logits,
    ),
    "split embedding, retied": (retied, trained),
}  # fmt: skip
BFLOAT16 = {"dtype": "bfloat16", "param_dtype": "float32"}
FAULTS = {  # what would be another result without a word -> what is said
    "columns of c_attn": (
        lambda folder: logits(planned(make(folder=folder), {
            "transformer.h.*.attn.c_attn": ColwiseParallel(), "transformer.h.*.attn.c_proj": RowwiseParallel(),
        })), "attn.c_attn: expected 48 columns, found 24, as where parallelize_module splits it by columns",
    ),
    "columns of c_attn, generated": (
        lambda folder: generated(planned(make(folder=folder), split("attn.c_attn", ColwiseParallel()))),
        "attn.c_attn: expected 48 columns, found 24",
    ),
    "columns of q_attn": (
        lambda folder: logits(
            planned(make(folder=folder), split("crossattention.q_attn", ColwiseParallel())),
            encoder_hidden_states=STATES,
        ), "crossattention.q_attn: expected 16 columns, found 8",
    ),
    "columns of the head": (
        lambda folder: generated(planned(make(folder=folder), split("lm_head", ColwiseParallel()))),
        "lm_head: expected 1024 columns, found 512",
    ),
    "columns of a classifier": (
        lambda folder: logits(
            planned(make(pt.GPT2ForSequenceClassification), split("score", ColwiseParallel())),
        ), "score: expected 4 columns, found 2",
    ),
    "a tied head alone": (
        lambda folder: trained(planned(make(folder=folder), split("lm_head", GATHERED))),
        "lm_head: expected the token embedding, found another parameter",
    ),
    "another dtype than FSDP's": (
        lambda folder: logits(sharded(make(folder=folder, **BFLOAT16))), "mp_policy=MixedPrecisionPolicy(param_dtype=",
    ),
}  # fmt: skip


def run_cases(rank, folder):
    """One of the two processes."""
    faulthandler.enable()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, (call, _) in {**CASES, **FAULTS}.items():
        try:
            found[name] = call(folder)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    model, other = (sharded(make(folder=folder, **BFLOAT16), param_dtype=torch.bfloat16) for _ in range(2))
    found["dtype"] = str(model(IDS).logits.dtype), generated(model), trained(other)
    if not rank:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an interpreter that ends beside threads of torch's aborts now and then


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    torch.multiprocessing.spawn(run_cases, (folder,), nprocs=2)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(name, folder, found):
    expected = CASES[name][1](make(folder=folder))
    if isinstance(expected, (str, float)) or "generates" in name or "beams" in name:
        assert found[name] == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)
    else:
        assert not isinstance(found[name], str), found[name]
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("name", FAULTS)
def test_a_split_that_would_be_wrong_is_one_sentence(name, found):
    assert str(found[name]).startswith("InputError: ") and FAULTS[name][1] in found[name], found[name]


def test_fsdp_computes_in_the_dtype_of_the_model(folder, found):
    model = make(folder=folder, **BFLOAT16)
    assert found["dtype"][0] == str(model(IDS).logits.dtype) == "torch.bfloat16"
    assert found["dtype"][1] == generated(model)
    assert found["dtype"][2] == pytest.approx(trained(model), rel=0.02)


OFFLOADS = {
    "cpu": lambda accelerate, model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda accelerate, model, folder: accelerate.disk_offload(
        model, folder, execution_device=torch.device("cpu")
    ),
    "dispatched": lambda accelerate, model, folder: accelerate.dispatch_model(
        model, {"transformer": "disk", "lm_head": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_model_computes_where_it_is_told(name, folder, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, alike = OFFLOADS[name](accelerate, make(folder=folder), tmp_path), make(folder=folder)
    assert model.transformer.h[0].mlp.c_fc.weight.is_meta and model.device == torch.device("cpu")
    assert generated(model) == generated(alike) and text(model) == text(alike)
    assert model.score("ROMEO and Juliet", tokenizer=GPT2Tokenizer.from_pretrained("demo")).log_probs.shape
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def test_an_offloaded_model_of_two_heads_computes(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, alike = (make(pt.GPT2DoubleHeadsModel) for _ in range(2))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model(IDS[None]).logits, alike(IDS[None]).logits)
