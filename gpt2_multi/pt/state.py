"""State dictionaries that others save and load: a tied head is in them once, and transformers' kernels are turned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpt2_multi.errors import InputError
from gpt2_multi.model.spelling import KERNEL, out_first

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def register_hooks(model: nn.Module) -> None:
    """Let `state_dict` and `load_state_dict` of a model, and of whatever holds it, do as the functions below."""
    model.register_state_dict_post_hook(leave_out_head)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(turn_kernels)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(fill_in_head)  # type: ignore[no-untyped-call]


def is_tied(model: nn.Module) -> bool:
    """Whether the language-model head is the token embedding, and both have their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return HEAD in parameters and parameters[HEAD] is parameters.get(EMBEDDING)


def leave_out_head(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A tied head is saved as the token embedding: safetensors takes no tensor twice. Only FSDP1 wants both."""
    if "_fsdp_wrapped_module." not in prefix and is_tied(model) and prefix + EMBEDDING in state:
        state.pop(prefix + HEAD, None)


def fill_in_head(
    model: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: Any, extra: Any,
    errors: list[str],
) -> None:  # fmt: skip
    """One of the two names stands for both, as one parameter; two tensors that differ cannot be tied."""
    names = [prefix + EMBEDDING, prefix + HEAD]
    found = [state[name] for name in names if name in state]
    if not found or not is_tied(model):
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


def is_split(x: object) -> bool:
    """Whether processes have a part of a tensor each."""
    return hasattr(x, "full_tensor")


def gather(x: Tensor) -> Tensor:
    """A tensor of which other processes have parts, as one, on the CPU: all of them have to call it together."""
    return x.full_tensor().cpu() if is_split(x) else x  # type: ignore[attr-defined]


def turn_kernels(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Kernels of (in, out), as transformers' state dictionaries have them, become nn.Linear's (out, in)."""
    own = {name: x for name, x in state.items() if name.startswith(prefix) and isinstance(x, Tensor)}
    if out_first({name: tuple(x.shape) for name, x in own.items()}) is False:
        state.update({name: x.mT for name, x in own.items() if KERNEL.search(name) and x.dim() == 2})
