"""GPT-2's body in PyTorch: MLP, block, and the bare model.

Shapes: B batch, T length of this call, S keys (past included), H heads, D head width, E `n_embd`, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from gpt2_multi.errors import InputError
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.outputs import BaseModelOutputWithPastAndCrossAttentions, Output
from gpt2_multi.pt.attention import (
    FLASH,
    Attention,
    Borrowed,
    Context,
    CrossAttention,
    Kernel,
    KVCache,
    begins,
    causal_bias,
    check_flash,
    documents,
    is_autocast,
    kernel,
    key_bias,
    positions,
    score_dtype,
    together,
)
from gpt2_multi.pt.layers import (
    bare_embedding,
    castable,
    embedding,
    facts,
    gelu,
    has_values,
    is_at_hand,
    is_concrete,
    perceptron,
    project,
    projection,
    to_numpy,
)
from gpt2_multi.pt.loading import GPT2PreTrainedModel


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) (Hendrycks and Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh_gelu": gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class MLP(nn.Module):
    """Two projections with the activation between them, `n_inner` (4 E by default) wide."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = projection(config, config.n_embd, inner)
        self.c_proj = projection(config, inner, config.n_embd)
        self.act = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        if self.act is gelu and not torch.compiler.is_compiling():
            found = perceptron(self.c_fc, self.c_proj, x)
            if found is not None:
                return self.dropout(found)
        return self.dropout(project(self.c_proj, self.act(project(self.c_fc, x))))


class GPT2Block(nn.Module):
    """Pre-norm transformer block (Radford et al. 2019, section 2.3); FSDP's wrapping policies know it by its name."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.n_embd, eps=config.layer_norm_epsilon)
        self.ln_1 = norm()
        self.attn = Attention(config, layer)
        if config.add_cross_attention:
            self.ln_cross_attn = norm()
            self.crossattention = CrossAttention(config, layer)
        self.ln_2 = norm()
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, context: Context, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        a, probs = self.attn(self.ln_1(x), context, head_mask)
        x, cross_probs = x + a, None
        if context.states is not None:
            a, cross_probs = self.crossattention(self.ln_cross_attn(x), context)
            x = x + a
        return x + self.mlp(self.ln_2(x)), probs, cross_probs


for output_class in Output.__subclasses__():
    torch.export.register_dataclass(output_class, serialized_type_name=f"gpt2_multi.{output_class.__name__}")


def recast(module: nn.Module, dtype: torch.dtype | None, *inputs: Any) -> Any:
    """Call a module, with its parameters cast to `dtype` where they are stored in another."""
    if dtype is None or all(parameter.dtype == dtype for parameter in castable(module).values()):
        return module(*inputs)
    if hasattr(module, "unshard"):
        return gathered(module, dtype, *inputs)
    cast = {name: parameter.to(dtype) for name, parameter in castable(module).items()}
    return torch.func.functional_call(module, cast, inputs)


def gathered(module: nn.Module, dtype: torch.dtype, *inputs: Any) -> Any:
    """Call a module of FSDP2, which gathers its parameters when it is called, and casts them by a policy of its own."""
    try:
        return module(*inputs)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        raise InputError(
            f"dtype: expected parameters of {dtype}, which the model computes in, found others that FSDP gathers; give "
            f"fully_shard mp_policy=MixedPrecisionPolicy(param_dtype={dtype})"
        ) from error


def old_calls(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a forward be called as in 2019: with `past` and `lm_labels`, and with ids (T,), which are one row.

    Outputs of the first unpack as tuples did; logits and states of the second are (T, ...). And as by loops of
    transformers 4, with `cache_position`.
    """

    @wraps(forward)
    def called(self: GPT2PreTrainedModel, *args: Any, **given: Any) -> Any:
        is_old = any(name in given for name in inputs.OLD_NAMES)
        if is_old:
            given = inputs.renamed(f"{type(self).__name__}.forward()", given)
        if not inputs.PACKED.isdisjoint(given):
            args, given = (), in_documents(signature(forward).bind_partial, self, args, given)
        ids = args[0] if args else given.get("input_ids")
        if "cache_position" in given:
            check_places(given.pop("cache_position"), ids, given)
        if isinstance(ids, Tensor) and ids.dim() == 1:
            output = of_row(forward, signature(forward).bind(self, *args, **given).arguments, ids.shape)
        else:
            output = forward(self, *args, **given)
        if is_old and isinstance(output, Output):
            output.unpacks = True
        return output

    return called


def check_places(places: Tensor | None, ids: Tensor | None, given: Mapping[str, Any]) -> None:
    """Of `cache_position` (T,): tokens can stand after those in the cache only, which they do without it."""
    if places is None:
        return
    embeds, past = given.get("inputs_embeds"), cast(Any, given.get("past_key_values"))
    new = ids.shape[-1] if ids is not None else 0 if embeds is None else embeds.shape[1]
    before = past.get_seq_length() if hasattr(past, "get_seq_length") else past[0][0].shape[-2] if past else 0
    inputs.check_cache_position(facts("cache_position", places), int(before), new)


def in_documents(bind: Callable[..., Any], model: Any, args: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What is given of documents in a row, without what says again where each begins, and with no cache of them.

    A mask (B, T) becomes one of rank 4, under which documents do not see each other.
    """
    told = {name: given.pop(name) for name in inputs.PACKED & given.keys()}
    told = {name: x for name, x in told.items() if x is not None}
    given = {name: x for name, x in bind(model, *args, **given).arguments.items() if name != "self"}
    if not told:
        return given
    inputs.check_alone(given.get("position_ids"), given.get("past_key_values"), given.get("use_cache"))
    places, mask = given["position_ids"], given.get("attention_mask")
    inputs.check_documents(facts("position_ids", begins(places).long()), {n: fact(n, x) for n, x in told.items()})
    if mask is not None and mask.dim() == 2:
        given["attention_mask"] = together(begins(places).cumsum(-1)) & (mask != 0)[:, None, None]
    return given | {"use_cache": False}


def fact(name: str, x: Any) -> inputs.Facts:
    """What is known of a tensor, or of a number."""
    return facts(name, torch.as_tensor(x))


def of_row(forward: Callable[..., Any], given: Mapping[str, Any], shape: torch.Size) -> Any:
    """A call whose ids are one row (T,), and so is what stands beside them, and what it gives for each token."""
    row = {name: x[None] if isinstance(x, Tensor) and x.shape == shape else x for name, x in given.items()}
    output = forward(**row | {"return_dict": True})
    for name in ("last_hidden_state", "logits"):
        if getattr(output, name, None) is not None and output[name].shape[:-1] == (1, *shape):
            setattr(output, name, output[name][0])
    return give(given["self"].config, output, given.get("return_dict"))


def recomputed(call: Callable[..., Any], *given: Any, offload: bool = False, **options: Any) -> Any:
    """What a call gives, computed again in the backward pass; with `offload`, what it is given waits on the CPU."""
    if not offload:
        return checkpoint(call, *given, **options)
    with save_on_cpu(pin_memory=torch.accelerator.is_available()):
        return checkpoint(call, *given, **options)


class GPT2Model(GPT2PreTrainedModel):
    """The bare GPT-2, without a head.

    `dtype` is what it computes in, `param_dtype` what it stores; both may be names. Without `dtype` it computes in
    whatever the parameters are stored in. `attn_implementation` is "sdpa", "eager" or "flash_attention_2", for which
    the package flash-attn has to be there; their results are equal.
    """

    head = "base"

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: torch.dtype | str | None = None,
        param_dtype: torch.dtype | str | None = None,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__(config, dtype)
        config = self.config
        self.embed_dim = config.n_embd
        self.gradient_checkpointing = False
        self.every_n_layers = 1
        self.checkpointing_options: dict[str, Any] = {"use_reentrant": False}
        self.has_looked = False  # at positions that a step on CUDA gave
        self.set_attn_implementation(attn_implementation)
        with self.building(param_dtype):
            self.wte = embedding(config)
            self.wpe = bare_embedding(config.n_positions, config.n_embd)
            self.drop = nn.Dropout(config.embd_pdrop)
            self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.compute_dtype or next(self.ln_f.parameters()).dtype

    @property
    def tables(self) -> tuple[int, int]:
        """The rows of the embeddings of tokens and positions; the configuration knows them where a wrapper does not."""
        tokens = getattr(self.wte, "num_embeddings", self.config.vocab_size)
        return tokens, getattr(self.wpe, "num_embeddings", self.config.n_positions)

    def attentions(self) -> list[Attention]:
        """The self-attention of every block, in whatever wraps it."""
        found = {module.layer: module for module in self.modules() if isinstance(module, Attention)}
        return [found[layer] for layer in sorted(found)]

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows, written in place by each call."""
        inputs.check_positions(0, max_length - 1, self.tables[1])
        shapes = [(batch_size, attn.num_heads, max_length, attn.head_dim) for attn in self.attentions()]
        own = self.device  # of a quantized layer, which has no parameters
        devices = [next((x.device for x in attn.parameters()), own) for attn in self.attentions()]
        return KVCache.empty(shapes, self.dtype, devices)

    @old_calls
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[Any, ...]:
        """The hidden states of (B, T) ids, or of (B, T, E) `inputs_embeds`.

        attention_mask: (B, past + T), 1 where a token counts; or of rank 4, (B or 1, H or 1, T or 1, past + T),
        booleans or integers (1 keeps) or floats (added to the scores); no mask shows a token what comes after it.
        past_key_values: a `KVCache`, a (key, value) pair for each layer, or a cache of transformers, which is extended
        in place and returned.
        position_ids: (B, T) or (1, T); without them a token's position is the count of unmasked tokens before it. With
        them, and with neither a mask nor a cache (`use_cache=False`), a document begins wherever they do not go on by
        one, and documents do not see each other, as in transformers.
        head_mask: (H,), (n_layer, H) or (n_layer, B, H, T, S). encoder_hidden_states: (B, encoder length, E),
        encoder_attention_mask: (B, encoder length).

        Raises InputError for an id outside the vocabulary, a position beyond `n_positions` and shapes that do not fit.
        """
        inputs.check_given(input_ids, inputs_embeds)
        source = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        cache = self._cache(past_key_values, use_cache)
        if not torch.compiler.is_compiling() and not getattr(past_key_values, "trusted", False):
            check_call(
                self.config, cache, str(self.dtype), self.tables,
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, head_mask=head_mask,
                position_ids=position_ids, inputs_embeds=inputs_embeds, encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )  # fmt: skip
            self._look_once(position_ids, attention_mask, cache)
        past = cache.length if cache is not None else 0
        places = positions(source, attention_mask, past) if position_ids is None else position_ids
        x = self.embed(source, places, token_type_ids)
        is_row = position_ids is not None and attention_mask is None and cache is None and x.shape[1] > 1
        numbers = documents(cast(Tensor, position_ids)) if is_row else None
        is_seen = self.config.output_attentions if output_attentions is None else output_attentions
        by_runs = self._kernel(x, attention_mask, numbers, past, not is_seen and head_mask is None)
        mask = together(numbers) if numbers is not None and by_runs is None else attention_mask
        context = self._context(x, cache, mask, encoder_hidden_states, encoder_attention_mask, by_runs)
        self._wanted(context, output_attentions, output_hidden_states)
        for layer, (block, heads) in enumerate(zip(self.h, self._head_masks(head_mask), strict=True)):
            note(context.hidden, x)
            x, probs, cross_probs = self._runner(layer, block)(x, context, heads)
            note(context.probs, probs)
            note(context.cross_probs, cross_probs)
        x = recast(self.ln_f, self.compute_dtype, x)
        note(context.hidden, x)
        return self._answer(x, cache, past_key_values, context, return_dict)

    def _look_once(self, position_ids: Tensor | None, mask: Tensor | None, cache: Any) -> None:
        """Where CUDA trains, no step waits for values; of documents that see each other the first says so."""
        if position_ids is None or self.has_looked or is_concrete(position_ids) or not has_values(position_ids):
            return
        self.has_looked = True
        if cache is not None or mask is not None:
            given = [x for x in (position_ids, mask) if x is not None]
            inputs.warn_of_documents(*(facts("", x)._replace(values=partial(to_numpy, x)) for x in given))

    def embed(self, source: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The first block's input, (B, T, E): the sum of tokens (ids, or their embeddings), positions and types."""
        dtype = self.dtype
        x = (source if source.is_floating_point() else self.wte(source)).to(dtype) + self.wpe(position_ids).to(dtype)
        return self.drop(x if token_type_ids is None else x + self.wte(token_type_ids).to(dtype))

    @property
    def checkpointing(self) -> bool:
        """Whether this call's activations are recomputed in the backward pass instead of kept."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _cache(self, past: Any, use_cache: bool | None) -> KVCache | Borrowed | None:
        # in a checkpoint_wrapper of torch, too, a block is run twice
        is_wrapped = torch.is_grad_enabled() and any(hasattr(block, "_checkpoint_wrapped_module") for block in self.h)
        if self.checkpointing or is_wrapped:
            inputs.check_recomputed(past, use_cache)
            return None
        if past is not None:
            is_trusted = isinstance(past, KVCache) and past.trusted
            return (past if is_trusted else as_cache(past, len(self.h))).fork()
        return KVCache() if (self.config.use_cache if use_cache is None else use_cache) else None

    def _kernel(
        self, x: Tensor, mask: Tensor | None, numbers: Tensor | None, past: int, may_fuse: bool
    ) -> Kernel | None:
        """What computes this call's self-attention by runs of tokens; None where a bias serves.

        `numbers` (B, T) are those of documents in a row, or None.
        """
        implementation = str(self.attn_implementation)
        if implementation == FLASH:
            check_flash(score_dtype(x), x.device, self.config.n_embd // self.config.n_head)
        if not may_fuse or x.shape[1] == 1 or implementation == "eager" or self.config.reorder_and_upcast_attn:
            return None
        return kernel(implementation, x, mask, numbers, past)

    def _context(
        self,
        x: Tensor,
        cache: KVCache | Borrowed | None,
        mask: Tensor | None,
        states: Tensor | None,
        states_mask: Tensor | None,
        by_runs: Kernel | None = None,
    ) -> Context:
        past, length = cache.length if cache is not None else 0, x.shape[1]
        context = Context(cache=cache, states=states, kernel=by_runs)
        if by_runs is None and mask is not None and mask.dim() == 2 and length == 1:
            context.bias = key_bias(mask, score_dtype(x))
        elif by_runs is None and (mask is not None or (past and length > 1)):
            context.bias = causal_bias(length, past + length, mask, score_dtype(x), x.device)
        if states is not None and states_mask is not None:
            context.states_bias = key_bias(states_mask, score_dtype(x))
        return context

    def _wanted(self, context: Context, attentions: bool | None, hidden_states: bool | None) -> None:
        attentions = self.config.output_attentions if attentions is None else attentions
        hidden_states = self.config.output_hidden_states if hidden_states is None else hidden_states
        context.eager = self.attn_implementation == "eager" or attentions  # fused kernels keep no probabilities
        context.hidden = [] if hidden_states else None
        context.probs = [] if attentions else None
        context.cross_probs = [] if attentions and context.states is not None else None

    def _runner(self, layer: int, block: Any) -> Callable[..., Any]:
        """What runs a block: itself, if it is not recomputed in the backward pass and computes in its own dtype."""
        if self.checkpointing and layer % self.every_n_layers == 0:
            return partial(recomputed, recast, block, self.compute_dtype, **self.checkpointing_options)
        return block if self.compute_dtype is None else partial(recast, block, self.compute_dtype)

    def _answer(
        self,
        x: Tensor,
        cache: KVCache | Borrowed | None,
        past_key_values: Any,
        context: Context,
        return_dict: bool | None,
    ) -> Any:
        """What a call gives, whose tokens are counted in its cache from now on."""
        if cache is not None:
            cache.length += x.shape[1]
            past_key_values = cache.returned()
        seen = (tuple(kept) if kept else None for kept in (context.hidden, context.probs, context.cross_probs))
        return give(self.config, BaseModelOutputWithPastAndCrossAttentions(x, past_key_values, *seen), return_dict)

    def _head_masks(self, head_mask: Tensor | None) -> Sequence[Tensor | None]:
        if head_mask is None:
            return [None] * len(self.h)
        if head_mask.dim() == 5:
            rows = head_mask.to(self.dtype)  # (n_layer, B, H, T, S)
        else:
            rows = head_mask.to(self.dtype).expand(len(self.h), -1)[:, None, :, None, None]  # (n_layer, 1, H, 1, 1)
        present = (attn.present for attn in self.attentions())
        return [row if row.shape[1] == 1 else row[:, heads] for row, heads in zip(rows, present, strict=True)]


def check_call(
    config: GPT2Config, cache: KVCache | Borrowed | None, dtype: str, tables: tuple[int, int], **given: Tensor | None
) -> None:
    """Everything that the body was given has to fit its configuration, the others and the cache."""
    found = {name: facts(name, x) for name, x in given.items() if x is not None}
    batch, length = inputs.check_source(config, found).shape[:2]
    past = cache.length if cache is not None else 0
    if past and not all(is_at_hand(x) for x in given.values() if x is not None):
        found = {name: x._replace(values=lambda: None) for name, x in found.items()}  # or each token waits for a GPU
    if cache is not None and cache.layers:
        key = cache.layers[0][0]
        inputs.check_cache(key.shape[0], str(key.dtype), batch, str(key.dtype) if is_autocast(key) else dtype)
    if cache is not None:
        if cache.capacity is not None:
            inputs.check_room(length, past, cache.capacity)
    inputs.check_call(config, found, tables, past, past + (length or 0), are_apart=cache is None)


def as_cache(past: Any, layers: int) -> KVCache | Borrowed:
    """A cache, ours or of transformers, or a (key, value) pair for each layer, each (B, H, S, D), as a cache.

    A new one may still be empty.
    """
    if not isinstance(past, KVCache) and hasattr(past, "update") and hasattr(past, "get_seq_length"):
        borrowed = Borrowed(past)
        inputs.check_past(past, len(borrowed.layers) in (0, layers), layers)
        return borrowed
    pairs = past.layers if isinstance(past, KVCache) else past
    fits = isinstance(pairs, (list, tuple)) and len(pairs) == layers and all(map(_is_pair, pairs))
    inputs.check_past(past, fits or (isinstance(past, KVCache) and not pairs), layers)
    return past if isinstance(past, KVCache) else KVCache([(pair[0], pair[1]) for pair in past], past[0][0].shape[2])


def _is_pair(layer: object) -> bool:
    if isinstance(layer, Tensor):  # as transformers stacked them until 2020
        return layer.dim() == 5 and len(layer) == 2
    parts = layer[:2] if isinstance(layer, (list, tuple)) else ()
    return len(parts) == 2 and all(isinstance(x, Tensor) and x.dim() == 4 for x in parts)


def note(kept: list[Tensor] | None, value: Tensor) -> None:
    """Keep a value where the caller wants to see it."""
    if kept is not None:
        kept.append(value)


def give(config: GPT2Config, output: Any, return_dict: bool | None) -> Any:
    """The output as it was asked for: a dataclass, or a tuple of the fields that are there."""
    if config.use_return_dict if return_dict is None else return_dict:
        return output
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if is_traced and isinstance(getattr(output, "past_key_values", None), KVCache):
        output.past_key_values = tuple(output.past_key_values)  # the tracer knows tensors and tuples
    return output.to_tuple()
