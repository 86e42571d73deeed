"""State dictionaries that others save and load: a tied head is in them once, and transformers' kernels are turned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2_multi.errors import CheckpointError, InputError, shortened
from gpt2_multi.model.checkpoint.quantized import SCALE, check_not_quantized
from gpt2_multi.model.spelling import TORCH, out_first, turned
from gpt2_multi.model.weights import Weight, table
from gpt2_multi.pt.layers import SCALED

Make = Callable[[], Any]
State = Mapping[str, Tensor] | None  # tensors in the place of a model's own

DONE, FAILED = -1, -2  # in place of the number of a tensor
REPLICATED = "_replicated"  # of a layer that each process has whole: the hooks that are for this
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def register_hooks(model: nn.Module) -> None:
    """Let `state_dict` and `load_state_dict` of a model, and of whatever holds it, do as the functions below."""
    model.register_state_dict_post_hook(leave_out_head)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(turn_kernels)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(as_cut)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(fill_in_head)  # type: ignore[no-untyped-call]


def is_tied(model: nn.Module) -> bool:
    """Whether the language-model head is the token embedding, and both have their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return HEAD in parameters and parameters[HEAD] is parameters.get(EMBEDDING)


def leave_out_head(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A tied head is saved as the token embedding: safetensors takes no tensor twice. Only FSDP1 wants both."""
    if "_fsdp_wrapped_module." not in prefix and is_tied(model) and prefix + EMBEDDING in state:
        state.pop(prefix + HEAD, None)
        state.pop(prefix + HEAD + SCALE, None)


def fill_in_head(
    model: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: Any, extra: Any,
    errors: list[str],
) -> None:  # fmt: skip
    """One of the two names stands for both, as one parameter; two tensors that differ cannot be tied."""
    if not is_tied(model):
        return
    if state.get(prefix + HEAD) is model.get_parameter(HEAD) and prefix + EMBEDDING in state:
        del state[prefix + HEAD]  # torch.distributed.checkpoint puts the old one where a dictionary has none
    fill_in(state, [prefix + EMBEDDING, prefix + HEAD], errors)
    fill_in(state, [prefix + EMBEDDING + SCALE, prefix + HEAD + SCALE], errors)


def fill_in(state: dict[str, Any], names: list[str], errors: list[str]) -> None:
    """What is there of two names that stand for one tensor is there under both."""
    found = [state[name] for name in names if name in state]
    if not found:
        return
    if len(found) == 2 and not same(*found):
        errors.append(
            f"{names[1]} differs from {names[0]}, although the head is the token embedding; to keep both, make the "
            "model with tie_word_embeddings=False"
        )
    shared = found[0] if isinstance(found[0], nn.Parameter) else nn.Parameter(found[0], requires_grad=False)
    state.update(dict.fromkeys(names, shared))


def lend_embedding(model: Any) -> None:
    """Where accelerate has the head's weight offloaded, let it fetch the embedding's: it looks for the head's name."""
    embedding = model.transformer.wte
    hook: Any = getattr(model.lm_head, "_hf_hook", None)
    weights = getattr(hook, "weights_map", None)
    if weights is not None and "weight" not in weights:
        lent = getattr(getattr(embedding, "_hf_hook", None), "weights_map", None)
        hook.weights_map = {"weight": embedding.weight.detach()} if lent is None else lent


def fetched(model: Any, name: str) -> Tensor:
    """A parameter, from where accelerate keeps it if it is offloaded."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    x: Tensor = getattr(module, leaf)
    if not x.is_meta:
        return x
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if leaf in (getattr(one, "weights_map", None) or ()):
            return torch.as_tensor(one.weights_map[leaf])  # type: ignore[union-attr]
    raise CheckpointError(f"{name}: has no values: it is on the device meta, and no hook of accelerate knows them")


def is_offloaded(model: Any) -> bool:
    """Whether accelerate keeps weights of a model elsewhere, and fetches them for each call."""
    return any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())


def check_present(model: Any, what: str) -> None:
    """What changes parameters has to have them: hooks would go on fetching the old ones."""
    if is_offloaded(model):
        raise InputError(
            f"{type(model).__name__}: an offloaded model cannot be {what}; load it without device_map, do that, and "
            "save it"
        )


def check_tied(model: Any) -> None:
    """What splits layers may make two parameters of a tied head and its embedding: each would be trained alone."""
    head, embedding = (getattr(part, "weight", None) for part in (model.lm_head, model.body.wte))  # or wrapped
    if model.config.tie_word_embeddings and head is not embedding and any(map(is_split, (head, embedding))):
        raise InputError(
            "lm_head: expected the token embedding, found another parameter, as where parallelize_module or fully_shard"
            " splits one without the other; split both alike, and call model.tie_weights()"
        )


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and values, as far as there are values."""
    if left is right or left.is_meta or right.is_meta:
        return left.shape == right.shape
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right.to(left.device))


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def is_replicated(layer: Any) -> bool:
    """Whether each process has an nn.Linear whole, and nobody has hooked it but who has put it on a mesh."""
    hooks = layer._forward_pre_hooks, layer._forward_hooks
    weight: Any = getattr(layer, "weight", None)
    is_hooked = layer._backward_hooks or layer._backward_pre_hooks or getattr(layer, REPLICATED, None) != hooks
    return type(layer) is nn.Linear and not is_hooked and all(x.is_replicate() for x in weight.placements)


def is_split(x: object) -> bool:
    """Whether processes have a part of a tensor each."""
    return hasattr(x, "full_tensor")


def cut_again(model: nn.Module) -> None:
    """Let FSDP2 give back the whole parameters that it keeps after a call, whose memory no array may share."""
    for module in model.modules():
        if callable(reshard := getattr(type(module), "reshard", None)):
            reshard(module)


def gather(x: Tensor) -> Tensor:
    """A tensor of which other processes have parts, as one, on the CPU: all of them have to call it together."""
    return x.full_tensor().cpu() if is_split(x) else x  # type: ignore[attr-defined]


def write_together(tensors: Iterable[object], makes: Sequence[Make], write: Callable[[Sequence[Make]], None]) -> None:
    """Write tensors; where processes have parts of them, the first writes, and each gathers what the first asks for.

    makes: what gathers a tensor, the same in all processes. write: called with what makes each of them. Where it fails,
    all processes raise.
    """
    if not any(map(is_split, tensors)):
        return write(makes)
    if dist.get_rank():
        while (number := heard(0)) >= 0:
            makes[number]()
        if number == FAILED:
            raise CheckpointError("save_pretrained: nothing was saved, since the first process failed; see its error")
        return

    def made(number: int) -> Any:
        heard(number)
        return makes[number]()

    try:
        write([partial(made, number) for number in range(len(makes))])
    except BaseException:
        heard(FAILED)
        raise
    heard(DONE)


def heard(number: int) -> int:
    """What the first process says to all, which call this."""
    accelerator = torch.accelerator.current_accelerator() if "nccl" in dist.get_backend() else None
    said = torch.tensor(number, device=accelerator or "cpu")
    dist.broadcast(said, 0)
    return int(said)


def check_whole(model: nn.Module, change: str) -> None:
    """A model whose parameters processes share is not changed in shape."""
    if any(map(is_split, model.parameters())):
        name = type(model).__name__.removeprefix("FSDP")
        raise InputError(
            f"{name}: a model that is cut over processes cannot be {change}; do it before it is cut, or with what "
            "save_pretrained writes"
        )


def check_changeable(model: Any, change: str, by: Sequence[str] = ("gpt2-multi",)) -> None:
    """A model whose parameters change in shape has to have them, whole and as floats.

    by: the programs whose integers do not change so.
    """
    check_not_quantized(model.config, type(model).__name__, change, (*by,))
    check_whole(model, change)
    check_present(model, change)


def check_same(name: str, given: object, mesh: Any) -> None:
    """The processes of a mesh axis have to be given the same, or each would compute a part of something else."""
    said = crc32(repr(given).encode())
    both = torch.tensor([said, -said], device=mesh.device_type)
    dist.all_reduce(both, dist.ReduceOp.MAX, mesh.get_group())
    if both.sum():
        raise InputError(
            f"{name}: expected the same in the {mesh.size()} processes of the mesh axis '{mesh.mesh_dim_names[0]}', "
            "which compute it together, found others; give them the same rows"
        )


def check_alike(model: Any, name: str, given: object, max_time: float | None = None) -> None:
    """What calls of a model follow from is the same in all processes that have parts of it, and their clocks are not.

    Otherwise those that call it more often would wait for the others. Of a model that is whole nothing is asked.
    """
    mesh: Any = getattr(model, "device_mesh", None)
    axes = [] if mesh is None else [axis for axis in ("fsdp", "tensor") if axis in mesh.mesh_dim_names]
    parted = [mesh[axis] for axis in axes if mesh[axis].size() > 1]
    if parted and max_time is not None:
        raise InputError(
            f"max_time: expected none for a model that is cut over processes, whose clocks differ, found {max_time}; "
            "give max_new_tokens"
        )
    for axis in parted:
        check_same(name, given, axis)


def check_meshed(mesh: object, rules: object, **others: object) -> None:
    """A model on a mesh is placed by its rules alone."""
    if mesh is None and rules is not None:
        raise InputError("rules: expected a mesh beside them, found none; sharding.make_mesh makes one")
    for name, given in others.items():
        if mesh is not None and given is not None:
            raise InputError(f"{name}: expected none beside a mesh, found {given!r}; leave one of the two out")


def turn_kernels(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Kernels of (in, out), as transformers' state dictionaries have them, become nn.Linear's (out, in)."""
    own = {name: x for name, x in state.items() if name.startswith(prefix) and isinstance(x, Tensor)}
    if out_first({name: tuple(x.shape) for name, x in own.items()}) is False:
        state.update({name: turned(name, x) for name, x in own.items()})


def as_cut(model: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Tensors that are whole become the parts of a model that is cut.

    Fused projections have dimensions apart in one that was cut, and one in a model that is whole.
    """
    cut_again(model)
    for name, parameter in model.named_parameters():
        x, alike = state.get(prefix + name), torch.empty(parameter.shape, device="meta")
        if isinstance(x, Tensor) and not is_split(x) and joined(name, x).shape == joined(name, alike).shape:
            x = x if x.shape == parameter.shape else x.reshape(parameter.shape)
            state[prefix + name] = cut_as(parameter, x) if is_split(parameter) else x


def joined(name: str, x: Tensor) -> Tensor:
    """A fused projection as files have it: of a model that was cut its queries, keys and values are apart."""
    dims = 2 if name.endswith(".weight") else 1
    return x.flatten(0, 1) if ".c_attn." in name and x.dim() == dims + 1 else x


def rows(model: Any) -> dict[str, Weight]:
    """The table's rows by the names that a model's state dictionary has for them."""
    rooted = model.base_model is not model
    return {TORCH.spell(weight, rooted): weight for weight in table(model.config, model.head)}


def scale_of(model: Any, name: str) -> Tensor | None:
    """The scales of a parameter that is in int8."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), SCALED, None) if leaf == "weight" else None


def own(model: Any) -> dict[str, Tensor]:
    """What a caller's class has besides the table: parameters and buffers that are saved, each once."""
    known, named = rows(model), dict(model.named_parameters(remove_duplicate=False))
    known |= {name + SCALE: row for name, row in known.items() if name + SCALE in named}
    shared = {id(named[name]) for name in known if name in named}
    found = {name: x for name, x in model.named_parameters() if id(x) not in shared and name not in known}
    if model.head in ("lm", "double_heads"):
        found.pop(HEAD, None)  # a row, or tied
        found.pop(HEAD + SCALE, None)
    for path, module in model.named_modules():
        for name, x in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = x
    return found


def own_shapes(model: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of what is its own, kernels of another GPT-2 inside as the table has them; and `other_names`."""
    return {name: tuple(turned(name, x).shape) for name, x in own(model).items()}, other_names(model)


def cut_as(x: Any, value: Tensor) -> Tensor:
    """A tensor that every process has, cut as another one is."""
    from torch.distributed.tensor import distribute_tensor  # which few programs need

    return distribute_tensor(value.to(x.dtype), x.device_mesh, x.placements, src_data_rank=None)


def taken(state: State, name: str, own: Any = None) -> Any:
    """A tensor to be saved: of a state dictionary in the place of the model's own, which has all, or its own."""
    if state is None:
        return own
    if name not in state:
        raise CheckpointError(f"state_dict: lacks {name}; give all of model.state_dict(), or leave it out")
    return state[name]


def check_kind(name: str, found: str, expected: str) -> None:
    """A tensor in the place of a model's own is of its kind, which is what config.json says of the file."""
    if found != expected:
        raise CheckpointError(
            f"state_dict: {name} is {shortened(found, 400)}, expected {shortened(expected, 400)}, as in the model; "
            "give what its state_dict() has, or leave it out"
        )


def other_names(model: Any) -> dict[str, str]:
    """The names under which modules have a parameter once more, as a tied head: name -> the one that is saved."""
    named = dict(model.named_parameters(remove_duplicate=False))
    saved = [*rows(model), *own(model)]
    known = {id(named[name]): name for name in (*saved, *(name + SCALE for name in saved)) if name in named}
    return {name: known[id(x)] for name, x in named.items() if known.get(id(x), name) != name}


def is_callers(cls: type) -> bool:
    """Whether a class is none of the library's: it may have more than the table."""
    return not cls.__module__.startswith("gpt2_multi.")


def check_transformer(model: Any) -> None:
    """What files have of GPT-2 needs a place in a caller's class."""
    named = dict(model.named_parameters(remove_duplicate=False))
    if any(name not in named for name in rows(model)):
        raise InputError(
            f"{type(model).__name__}: expected a GPT2Model as self.transformer, which files fill, found none; give it "
            "that name in __init__"
        )
