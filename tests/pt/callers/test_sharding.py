"""A model cut over meshes of processes: what it computes, learns and refuses; rules and meshes.

Two processes answer all questions, once, in about 8 s; a test looks at what the first has found. Four answer those of
larger meshes, where GPT2_MULTI_THOROUGH asks for it.
"""

import faulthandler
import json
import os
import shutil
import signal
import tempfile
import threading
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.utils import parametrize

from gpt2_multi import CheckpointError, GPT2Config, GPT2Tokenizer, InputError, pt
from gpt2_multi.app.doctor.memory import Job, needed
from gpt2_multi.files.containers import read_safetensors
from gpt2_multi.pt import training
from gpt2_multi.pt.layers import to_torch
from gpt2_multi.pt.parameters import resuming
from gpt2_multi.pt.parameters.resuming import restore_state, save_state, saved_steps
from gpt2_multi.pt.parameters.sharding import (
    DATA,
    FSDP,
    TENSOR,
    check_mesh,
    cuts,
    make_mesh,
    shard,
    shard_batch,
    tensor_parallel_plan,
)
from tests.app.train import several
from tests.support.effort import THOROUGH

CONFIG = GPT2Config(
    vocab_size=64, n_positions=24, n_embd=16, n_layer=2, n_head=4, n_inner=32, num_labels=4, initializer_range=0.3,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0, classifier_dropout=0.0,
    bos_token_id=0, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
IDS = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(0))
STATES = torch.linspace(-1, 1, 4 * 3 * 16).view(4, 3, 16)
WORDS = TENSOR | {"vocab": "tensor"}
MESHES = {  # of two processes
    "data=2": DATA,
    "fsdp=2": FSDP,
    "tensor=2": WORDS,
}
MORE = {  # of four
    "data=4": DATA,
    "fsdp=4": FSDP,
    "tensor=4": WORDS,
    "data=2,fsdp=2": FSDP,
    "data=2,tensor=2": TENSOR,
    "fsdp=2,tensor=2": FSDP | WORDS,
}
HEADS = {
    "base": pt.GPT2Model,
    "double_heads": pt.GPT2DoubleHeadsModel,
    "sequence_classification": pt.GPT2ForSequenceClassification,
    "token_classification": pt.GPT2ForTokenClassification,
    "question_answering": pt.GPT2ForQuestionAnswering,
}


def make(cls=pt.GPT2LMHeadModel, dtype="float32", seed=0, **settings):
    torch.manual_seed(seed)
    return cls(CONFIG.replace(**settings), param_dtype=dtype)


def one_and_many(mesh, rules, *args, **settings):
    """A whole model, and the same on a mesh, whose own first values count in the first process alone."""
    return make(*args, **settings), shard(make(*args, seed=dist.get_rank(), **settings), mesh, rules)


def mean(x, mesh):
    """What is alike in all processes, of what each has of its rows."""
    total = torch.as_tensor(x, dtype=torch.float64).detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def losses(model, mesh=None, steps=10, **options):
    optimizer = torch.optim.AdamW(training.parameter_groups(model), lr=1e-2)
    found = []
    for _ in range(steps):
        batch = {"input_ids": IDS, "labels": IDS, **options}
        batch = batch if mesh is None else {**batch, **shard_batch({"input_ids": IDS, "labels": IDS}, mesh)}
        loss = training.train_step(model, optimizer, [batch], max_norm=0.5)
        found.append(float(loss if mesh is None else mean(loss, mesh)))
    return found


def far(left, right):
    """The greatest distance of two lists of numbers, or of two tensors."""
    return float((torch.as_tensor(left).double() - torch.as_tensor(right).double()).abs().max())


def learns(mesh, rules, dtype):
    one, many = one_and_many(mesh, rules, dtype=dtype)
    found, expected = losses(many, mesh), losses(one)
    assert expected[-1] < expected[0] - 1
    return far(found, expected)


def learns_in_parts(mesh, rules):
    """In chunks of the head, with activations that are computed again, of frozen embeddings."""
    models = one_and_many(mesh, rules, dtype="float64")
    for model in models:
        model.gradient_checkpointing_enable(every_n_layers=1)
        model.body.wpe.requires_grad_(False)
    known, training.CHUNK["cpu"] = training.CHUNK["cpu"], 64 * 8 * 3
    found, expected = losses(models[1], mesh, 3, skip_logits=True), losses(models[0], None, 3, skip_logits=True)
    training.CHUNK["cpu"] = known
    return far(found, expected)


def learns_in_chunks(mesh, rules):
    """By rules that leave the head whole in each process."""
    with mock.patch.object(training, "walk", wraps=training.walk) as walk:
        found = learns_in_parts(mesh, {axis: over for axis, over in rules.items() if axis != "vocab"})
    assert walk.call_count == 6, "no process has all logits at once"
    return found


def learns_after_a_call(mesh, rules):
    """An optimizer that is made after a call, in a dtype that follows the cut, of weights that are loaded whole."""
    models, others = one_and_many(mesh, rules), make(dtype="float64", seed=9).state_dict()
    for model in models:
        model.double()(IDS)
        model.load_state_dict(others)
        model(IDS)
    return far(losses(models[1], mesh, 3), losses(models[0], None, 3))


def learns_compiled(mesh, rules):
    """By blocks that the compiler has made."""
    one, many = one_and_many(mesh, rules, dtype="float64")
    for block in many.transformer.h:
        block.compile()
    return far(losses(many, mesh, 3), losses(one, None, 3))


def heads(mesh, rules):
    """Every head's gradient of a sum of all that it gives, in float64."""
    worst = 0.0
    for cls in HEADS.values():
        models, found = one_and_many(mesh, rules, cls, dtype="float64"), []
        for model in models:
            ids = IDS.view(2, 2, 10) if cls is pt.GPT2DoubleHeadsModel else IDS
            output = model(ids, return_dict=True)
            values = [x for x in output.to_tuple() if isinstance(x, torch.Tensor)]
            sum(x.square().sum() for x in values).backward()
            grads = [whole(p.grad).flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.cat([*(x.detach().flatten() for x in values), *grads]))
        worst = max(worst, far(*found) / float(found[0].abs().max()))
    return worst


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def inside(mesh, rules):
    """Cross-attention, masks of each head, probabilities of all heads, and caches."""
    one, many = one_and_many(mesh, rules, dtype="float64", add_cross_attention=True)
    mask = (torch.rand(4, 4, 10, 10, generator=torch.Generator().manual_seed(1)) > 0.3).logical_or(torch.eye(10).bool())
    given = dict(encoder_hidden_states=STATES.double(), output_attentions=True, use_cache=True)
    head_mask = torch.tensor([[1.0, 0.5, 0.25, 2.0], [0.0, 1.0, 3.0, 1.0]], dtype=torch.float64)
    found = []
    for model in (one, many):
        first = model(IDS, attention_mask=mask, head_mask=head_mask, **given)
        again = model(IDS[:, :2], past_key_values=first.past_key_values, encoder_hidden_states=STATES.double())
        parts = first.logits, again.logits, *first.attentions, *first.cross_attentions
        found.append(torch.cat([x.detach().flatten() for x in parts]))
    return far(*found)


def drops(mesh, rules):
    """Dropout: the processes of a tensor axis agree although their generators do not, and heads have masks apart."""
    torch.manual_seed(7)
    model = shard(make(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5), mesh, rules).train()
    torch.manual_seed(dist.get_rank())
    model.gradient_checkpointing_enable()
    outputs = model(IDS, labels=IDS, output_attentions=True)
    outputs.loss.backward()
    norms = torch.stack([whole(p.grad).norm() for p in model.parameters()])
    first, apart = mean(norms, mesh), (outputs.attentions[0] == 0)
    same = float((apart[:, :2] == apart[:, 2:]).tril().float().mean()) if mesh["tensor"].size() > 1 else 0.0
    return [far(first, norms), float((apart.tril().sum() / apart.new_ones(apart.shape).tril().sum() - 0.5).abs()), same]


def planned(mesh, rules):
    """What users do by torch's own function."""
    model = parallelize_module(make(dtype="float64"), mesh["tensor"], tensor_parallel_plan(CONFIG))
    model.tie_weights()
    return far(losses(model, None, 3), losses(make(dtype="float64"), None, 3))


def sizes(mesh, rules):
    """Whether each process has of each parameter what `cuts` says, and the largest the bytes that `plan` does."""
    model = shard(make(), mesh, rules)
    shape = check_mesh(mesh, rules)
    own = {name: tuple(x.to_local().shape) for name, x in model.named_parameters()}
    optimizer = torch.optim.AdamW(training.parameter_groups(model), lr=1e-2)
    training.train_step(model, optimizer, [shard_batch({"input_ids": IDS, "labels": IDS}, mesh)])
    held = {"weights": [*model.parameters()], "gradients": [x.grad for x in model.parameters()]}
    held["optimizer"] = [x for state in optimizer.state.values() for name, x in state.items() if "exp_avg" in name]
    most = torch.tensor([sum(x.to_local().nbytes for x in tensors) for tensors in held.values()])
    dist.all_reduce(most, dist.ReduceOp.MAX)
    on_paper = needed(Job(CONFIG, rules=rules, length=10), ",".join(f"{axis}={n}" for axis, n in shape.items()))
    assert most.tolist() == [on_paper.uses["training"][kind] for kind in held]
    if dist.get_rank():
        return None
    return [name for name, cut in cuts(CONFIG, rules).items() if own[name] != cut.part(shape)]


def files(mesh, rules, folder):
    """Each reads its parts of the files, in bfloat16 too, and goes on as one process does; the first writes them again.

    What is written are the files that one process writes, bit by bit.
    """
    torch.manual_seed(dist.get_rank())
    model = pt.GPT2LMHeadModel.from_pretrained(folder / "model", mesh=mesh, rules=rules)
    assert not any(x.is_meta for x in model.parameters()) and model.lm_head.weight is model.transformer.wte.weight
    written = folder / "".join(filter(str.isalnum, f"{mesh.mesh_dim_names}{mesh.mesh.tolist()}{[*rules]}"))
    with torch.no_grad():
        model(IDS)  # FSDP2 has whole parameters from now on
    model.save_pretrained(written, max_shard_size="9KB")
    config, again = json.loads((written / "config.json").read_text()), pt.GPT2LMHeadModel.from_pretrained(written)
    known = pt.GPT2LMHeadModel.from_pretrained(folder / "model")
    pairs = zip(again.state_dict().values(), known.state_dict().values(), strict=True)
    assert config["architectures"] == ["GPT2LMHeadModel"] and all(torch.equal(*pair) for pair in pairs)
    half = dict(dtype="bfloat16", mesh=mesh, rules=rules)
    half = pt.GPT2ForSequenceClassification.from_pretrained(folder / "model", num_labels=4, **half)
    scores = half(IDS).logits.detach()
    assert scores.dtype == torch.bfloat16 and half.transformer.wte.weight.dtype == torch.bfloat16
    assert far(mean(scores, mesh), scores) == 0, "a new head is the same everywhere"
    return far(losses(model.train(), mesh), losses(known.train()))


def resumes(mesh, rules, folder):
    """Goes on bit by bit from a state, on one process as well, by a whole model or by one that is cut."""
    model = shard(make(), mesh, rules)
    optimizer = torch.optim.AdamW(training.parameter_groups(model), lr=1e-2)
    place = folder / f"states {mesh.mesh.tolist()} {[*rules]}"
    batch = shard_batch({"input_ids": IDS, "labels": IDS}, mesh)

    def go(model, optimizer, steps, batch=batch):
        return [training.train_step(model, optimizer, [batch]) for _ in range(steps)]

    go(model, optimizer, 2)
    for step in range(1, 4):
        save_state(place, model, optimizer, step)
    rest = go(model, optimizer, 2)
    assert saved_steps(place) == [2, 3]
    again = shard(make(seed=5), mesh, rules)
    optimizer = torch.optim.AdamW(training.parameter_groups(again), lr=1e-2)
    assert restore_state(place, again, optimizer) == 3 and go(again, optimizer, 2) == rest
    assert all(torch.equal(whole(x), whole(y)) for x, y in zip(again.parameters(), model.parameters(), strict=True))
    rest = mean(rest, mesh)
    alone = make(seed=6)
    optimizer = torch.optim.AdamW(training.parameter_groups(alone), lr=1e-2)
    restore_state(place, alone, optimizer, 2)
    return far(go(alone, optimizer, 2, {"input_ids": IDS, "labels": IDS}), rest)


def trains(mesh, _, folder):
    """The engine of `gpt2-multi train`: what it learns, measures, writes and goes on with is that of one process."""
    from gpt2_multi.app.train.engines import pt as engines

    team = engines.join("cpu")
    alone = engines.PTTeam.__new__(engines.PTTeam)
    alone.process, alone.processes, alone.place = 0, 1, team.place
    shape = ",".join(f"{axis}={size}" for axis, size in zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    found, written = [], []
    for one, name in ((alone, ""), (team, shape)):
        share, plan = one.share(name), several.plan_of("pt", mesh=name)
        model, state = (folder / f"{kind} {name}" for kind in ("trained", "state"))
        state.mkdir(exist_ok=True)
        engine, again = (engines.build(plan, folder / "model", one) for _ in range(2))

        def train(engine, step, share=share, plan=plan):
            return map(float, engine.train(several.batch(step, *share), step, plan.rate(step)))

        answers = [*train(engine, 0), *train(engine, 1)]
        answers += map(float, engine.evaluate({key: x[1] for key, x in several.batch(9, *share).items()}))
        engine.save_model(None if dist.get_rank() else model)  # after a call without gradients
        engine.save_state(None if dist.get_rank() else state)
        dist.barrier()
        again.load_state(folder / "state ")  # of one process
        found.append([*answers, *train(engine, 2), *train(again, 2)])
        files = {**read_safetensors(state / "state.safetensors"), **read_safetensors(model / "model.safetensors")}
        written.append({key: to_torch(x) for key, x in files.items()})
    return max(far(*found), *(far(x, written[1][key]) for key, x in written[0].items()))


def writes(mesh, rules):
    """Greedy, sampled, by beams, padded, by lookup, static, streamed, continued, and scored, as one process does."""
    one, many = one_and_many(mesh, rules)
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    padded = dict(attention_mask=(torch.arange(10) > torch.tensor([[0], [3], [5], [1]])).long(), max_new_tokens=8)
    sampled = dict(do_sample=True, seed=3, top_k=20, max_new_tokens=12)
    found = []
    for model in (one.eval(), many.eval()):
        first = model.generate(IDS, max_new_tokens=4, return_dict_in_generate=True)
        again = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=2)
        static = model.generate(IDS, max_new_tokens=6, cache_implementation="static")
        made = [model.generate(IDS, **padded), model.generate(IDS, **sampled), again, static]
        made += [model.generate(IDS, num_beams=3, max_new_tokens=5), *model.stream_tokens(IDS, **sampled)]
        made.append(model.generate(IDS[:1], prompt_lookup_num_tokens=2, max_new_tokens=8))
        found.append([x.tolist() for x in made])
    texts, how = [], {"mesh": mesh, "rules": demo_rules(mesh, rules)}
    for cut in (False, True):
        model = pt.GPT2LMHeadModel.from_pretrained("demo", **(how if cut else {}))
        known = model.generate("ROMEO:", tokenizer=tokenizer, max_new_tokens=40)  # enough that weights are packed
        streamed = "".join(model.stream("ROMEO:", tokenizer=tokenizer, max_new_tokens=12, do_sample=True, seed=1))
        scored = model.score(["ROMEO and Juliet", "to be"], tokenizer=tokenizer)
        texts.append((known, streamed, [x.perplexity for x in scored]))
    assert texts[0][:2] == texts[1][:2] and far(texts[0][2], texts[1][2]) < 1e-3
    return found[0] == found[1]


def demo_rules(mesh, rules):
    """What divides of the demo model, which has 6 heads."""
    left_out = {"vocab", "head"} if mesh["tensor"].size() == 4 else {"vocab"}
    return {axis: over for axis, over in rules.items() if axis not in left_out}


QUESTIONS = {
    "writes": writes,
    "learns": partial(learns, dtype="float64"),  # and `files` in float32
    "parts": learns_in_parts,
    "called": learns_after_a_call,
    "heads": heads,
    "inside": inside,
    "sizes": sizes,
}
TENSORS = {"chunks": learns_in_chunks, "drops": drops, "planned": planned}  # questions of a tensor axis


def twice(mesh):
    shard(shard(make(), mesh, WORDS), mesh, WORDS)


def first_cannot_save(mesh):
    """All processes hear of it, and none waits for another."""
    folder = Path(tempfile.gettempdir(), f"states-of-{os.getppid()}")
    model = shard(make(), mesh, TENSOR)
    optimizer = torch.optim.AdamW(model.parameters())
    with mock.patch.object(resuming, "exchange", side_effect=OSError("no room")):
        try:
            save_state(folder, model, optimizer, 1)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def own_rows(mesh):
    shard(make(), mesh, WORDS)(IDS + dist.get_rank())


def cast(_):
    model = shard(make(), make_mesh("data=2"), DATA)
    model(IDS)
    model.bfloat16()(IDS)


def wrapped(mesh):
    model = make()
    parametrize.register_parametrization(model.transformer.h[0].mlp.c_fc, "weight", torch.nn.Identity())
    shard(model, mesh, WORDS)


def added(_):
    model = shard(make(), make_mesh("fsdp=2"), FSDP)
    model.transformer.h[1].adapter = torch.nn.Linear(2, 2)
    model.eval()(IDS)
    model.train()(IDS)


FAULTS = {
    "first": (first_cannot_save, "the state could not be saved (no room)"),
    "wrapped": (wrapped, "model: expected the parameters of a GPT-2, found none under transformer.h.0.mlp.c_fc.weight"),
    "added": (
        added,
        "model: expected parameters that were there when it was cut, found transformer.h.1.adapter.weight, which each",
    ),
    "cast": (cast, "dtype: expected parameters of torch.float32, in which FSDP2 gathers them since the first call"),
    "heads": (
        lambda mesh: shard(make(n_head=1), mesh, TENSOR),
        "h.0.attn.c_attn.weight: the axis 'head' has 1 entries, which 2 processes of the mesh axis 'tensor' cannot",
    ),
    "words": (
        lambda mesh: shard(make(vocab_size=65), mesh, WORDS),
        "wte.weight: the axis 'vocab' has 65 entries, which 2 processes of the mesh axis 'tensor' cannot share equally",
    ),
    "planned heads": (
        lambda mesh: parallelize_module(make(n_head=1), mesh["tensor"], tensor_parallel_plan(CONFIG)),
        "head: the attention of layer 0 has 1 heads, which 2 processes cannot share equally",
    ),
    "nothing": (
        lambda mesh: shard(make(), mesh, FSDP),
        "rules: nothing is cut over 'tensor', of which the mesh has 2; add sharding.TENSOR",
    ),
    "twice": (twice, "model: expected one that is whole, found parameters that are cut already"),
    "rows": (own_rows, "input_ids: expected the same in the 2 processes of the mesh axis 'tensor'"),
    "prompts": (
        lambda mesh: shard(make(), mesh, WORDS).generate(IDS // 2 + dist.get_rank(), max_new_tokens=2),
        "input_ids: expected the same in the 2 processes of the mesh axis 'tensor', which compute it together",
    ),
    "clocks": (
        lambda mesh: shard(make(), mesh, WORDS).generate(IDS, max_new_tokens=2, max_time=9),
        "max_time: expected none for a model that is cut over processes, whose clocks differ, found 9",
    ),
    "size": (lambda mesh: make_mesh("data=3"), "product is the number of processes, 2, found 'data=3', which needs 3"),
    "names": (
        lambda mesh: shard(make(), init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), FSDP),
        "mesh: expected axes among data, fsdp, tensor, fsdp among them, found dp; sharding.make_mesh makes one",
    ),
    "no mesh": (lambda mesh: shard(make(), "tensor=2", TENSOR), "mesh: expected a torch.distributed.DeviceMesh, found"),
    "resized": (
        lambda mesh: shard(make(), mesh, TENSOR).resize_token_embeddings(70),
        "GPT2LMHeadModel: a model that is cut over processes cannot be resized; do it before it is cut",
    ),
    "pruned": (
        lambda mesh: shard(make(), mesh, TENSOR).prune_heads({0: [1]}),
        "GPT2LMHeadModel: a model that is cut over processes cannot be pruned",
    ),
    "unwritten": (
        lambda mesh: shard(make(), mesh, TENSOR).save_pretrained(Path("/proc/none")),
        "expected a folder to save the model in, found none",
    ),
    "batch": (
        lambda mesh: shard_batch({"input_ids": IDS[:3]}, make_mesh("data=2")),
        "input_ids: expected a number of rows that 2 processes share equally, found 3",
    ),
}  # fmt: skip


def answers(rank, folder, count, meshes):
    """One of the processes."""
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{count}", rank=rank, world_size=count)
    found = {}
    for name, rules in meshes.items():
        mesh = make_mesh(name)
        asked = QUESTIONS | (TENSORS if "tensor" in name else {}) | {"files": partial(files, folder=folder)}
        asked |= {"resumes": partial(resumes, folder=folder), "trains": partial(trains, folder=folder)}
        asked |= {"compiled": learns_compiled} if THOROUGH and count == 2 else {}
        found[name] = {question: call(mesh, rules) for question, call in asked.items()}
    mesh = make_mesh("tensor=2") if count == 2 else None
    for name, (call, _) in FAULTS.items() if mesh else ():
        try:
            call(mesh)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    if not rank:
        (folder / f"found{count}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # an interpreter that ends beside threads of torch's aborts now and then


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes have found; and what four have."""
    folder, answered = tmp_path_factory.mktemp("sharding"), {}
    make().save_pretrained(folder / "model")
    for count, meshes in ((2, MESHES), *([(4, MORE)] if THOROUGH else [])):
        torch.multiprocessing.spawn(answers, (folder, count, meshes), nprocs=count)
        answered |= json.loads((folder / f"found{count}.json").read_text())
    return answered


@pytest.mark.parametrize("mesh", MESHES | (MORE if THOROUGH else {}))
def test_a_mesh_computes_and_learns_what_one_process_does(mesh, found):
    answer = found[mesh]
    print(mesh, answer)
    assert max(answer[name] for name in ("files", "resumes")) < 1e-5
    exact = "learns", "parts", "called", "compiled", "chunks", "heads", "inside", "planned", "trains"
    assert max(answer[name] for name in exact if name in answer) < 1e-9
    assert answer["sizes"] == [] and answer["writes"]


def test_dropout_is_the_same_on_a_tensor_axis_and_apart_in_its_heads(found):
    difference, rate, same = found["tensor=2"]["drops"]
    assert difference < 1e-6 and rate < 0.1 and same < 0.9


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_one_sentence(name, found):
    assert found[name].startswith(("InputError: ", "CheckpointError: ")) and FAULTS[name][1] in found[name], found[name]


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"heads": "tensor"}, r"rules: expected named axes among .*, found 'heads'; did you mean 'head'\?"),
        ({"embed": "fsdp", "mlp": "fsdp"}, "'mlp' and 'embed' are both cut over 'fsdp', but .*c_fc.weight has both"),
        ({"head": "tensors"}, r"'head' is to be cut over the mesh axis 'tensors', expected fsdp or tensor; did you"),
        ({"embed": "tensor"}, "'embed' is to be cut over the mesh axis 'tensor', expected fsdp"),
        ({"qkv": "tensor"}, "'qkv' is to be cut over the mesh axis 'tensor', expected none; vocab, .* can be cut"),
        (["embed"], "rules: expected a dict such as sharding.FSDP, found list"),
    ],
)  # fmt: skip
def test_bad_rules_are_one_sentence(rules, sentence):
    with pytest.raises(InputError, match=sentence):
        cuts(CONFIG, rules)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rules": FSDP}, "rules: expected a mesh beside them, found none; sharding.make_mesh makes one"),
        ({"mesh": "data=2", "device_map": "cpu"}, "device_map: expected none beside a mesh, found 'cpu'; leave one"),
    ],
)
def test_a_mesh_has_rules_and_rules_a_mesh(given, sentence):
    with pytest.raises(InputError, match=sentence):
        pt.GPT2LMHeadModel.from_pretrained("demo", **given)


def begun(seed=0, **settings):
    model = make(seed=seed, **settings)
    return model, torch.optim.AdamW(training.parameter_groups(model), lr=1e-2)


def test_a_state_that_does_not_fit_is_one_sentence(tmp_path):
    model, optimizer = begun()
    with pytest.raises(CheckpointError, match="expected a saved state, found none; save_state writes one"):
        restore_state(tmp_path, model, optimizer)
    for step in (7, 3, 3):
        save_state(tmp_path, model, optimizer, step)
    assert saved_steps(tmp_path) == [3, 7]
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000003", "step-000000007"}
    with pytest.raises(CheckpointError, match="expected a saved state, found only those of the steps 3, 7"):
        restore_state(tmp_path, model, optimizer, 4)
    for settings, name in (
        ({"n_layer": 1}, r"model.transformer.h.1.\S+ to be absent, found float32"),
        ({"n_embd": 32}, r"model.transformer.wte.weight to be float32\[64, 32\], found float32\[64, 16\]"),
    ):
        with pytest.raises(CheckpointError, match=f"the state of step 7: expected {name}.*; make the model and the"):
            restore_state(tmp_path, *begun(**settings))
    for path in (tmp_path / "step-000000007").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"the state of step 7 is damaged .*; delete it to go on from the one"):
        restore_state(tmp_path, model, optimizer)
    with pytest.raises(CheckpointError, match="the state could not be saved"):
        save_state("/proc/none", model, optimizer, 1)


def killed(rank, folder):
    """Saves a state, and is killed, if it is the second of two processes, while it writes the next."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = shard(make(), make_mesh("fsdp=2"), FSDP)
    optimizer = torch.optim.AdamW(training.parameter_groups(model), lr=1e-2)
    losses(model, make_mesh("fsdp=2"), 2)
    save_state(folder / "states", model, optimizer, 2)
    if rank:
        FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save_state(folder / "states", model, optimizer, 3)


def restored(rank, folder):
    """Goes on from the last whole state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
    mesh = make_mesh("tensor=2")
    model = shard(make(seed=4), mesh, TENSOR)
    optimizer = torch.optim.AdamW(training.parameter_groups(model), lr=1e-2)
    assert restore_state(folder / "states", model, optimizer) == 2
    save_state(folder / "states", model, optimizer, 3)
    found = losses(model, mesh, 1)
    if not rank:
        (folder / "loss.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def anonymous():
    """How many bytes a process has that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "RssAnon" in line)


def weighed(rank, folder):
    """How much memory a process takes while it reads its parts, in parts, and while it saves them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found, mesh = [], make_mesh("fsdp=2")

    def peak(call):
        top, is_done = [anonymous()], threading.Event()

        def watch():
            while not is_done.wait(0.002):
                top.append(anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        answer = call()
        is_done.set()
        watcher.join()
        found.append(max(top) - top[0])
        return answer

    read = partial(pt.GPT2LMHeadModel.from_pretrained, folder / "model", mesh=mesh, rules=FSDP)
    pt.GPT2LMHeadModel.from_pretrained("demo", mesh=mesh, rules=FSDP)  # what the first of all takes
    model = peak(read)
    peak(partial(model.save_pretrained, folder / "saved"))
    own = sum(x.to_local().nbytes for x in model.parameters())
    (folder / f"memory{rank}.json").write_text(json.dumps([*found, own]))
    dist.destroy_process_group()


if THOROUGH:

    def test_the_last_whole_state_survives_a_kill(tmp_path):
        with pytest.raises(Exception, match="process"):
            torch.multiprocessing.spawn(killed, (tmp_path,), nprocs=2)
        assert saved_steps(tmp_path / "states") == [2] and (tmp_path / "states" / ".unfinished").exists()
        model, optimizer = begun(seed=3)
        assert restore_state(tmp_path / "states", model, optimizer) == 2
        torch.multiprocessing.spawn(restored, (tmp_path,), nprocs=2)
        assert saved_steps(tmp_path / "states") == [2, 3]
        (loss,) = json.loads((tmp_path / "loss.json").read_text())
        assert losses(model, None, 1) == pytest.approx([loss], abs=1e-5)

    def test_no_process_holds_more_than_its_parts(tmp_path):
        make(vocab_size=4000, n_embd=512, n_inner=None, n_layer=8).save_pretrained(tmp_path / "model")
        torch.multiprocessing.spawn(weighed, (tmp_path,), nprocs=2)
        for rank in range(2):
            reading, saving, own = json.loads((tmp_path / f"memory{rank}.json").read_text())
            print(reading / own, saving / own)
            assert own > 2**25 and 0.8 * own < reading < 1.2 * own and saving < 4 * 4000 * 512 * 4 < own


def test_a_quantized_model_is_refused():
    from gpt2_multi.model.checkpoint.quantized import with_method

    with pytest.raises(InputError, match="rules: expected none for a quantized model"):
        cuts(with_method(CONFIG, "int8"), FSDP)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ("dat=2", r"mesh: expected the axes data, fsdp, tensor, found 'dat'; did you mean 'data'\?"),
        ("data=two", "mesh: expected a positive number for 'data', found 'two'; write for example data=2"),
        ("data=2,fsdp=2", "mesh: expected a process group, found none; start the program by torchrun .*-node 4, or"),
    ],
)
def test_a_bad_mesh_is_one_sentence(shape, sentence):
    with pytest.raises(InputError, match=sentence):
        make_mesh(shape)
