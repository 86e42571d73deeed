"""GPT-2's body in Flax: MLP, block, and the bare linen module.

`GPT2Module` stands alone: `module.init(key, ids)["params"]`, `module.apply({"params": params}, ids, mask)`.
Shapes: B batch, T length of this call, S keys (past included), H heads, D head width, E `n_embd`, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from gpt2_multi.flax.attention import (
    Attention,
    Context,
    CrossAttention,
    KVCache,
    Layer,
    Pair,
    causal_bias,
    key_bias,
    positions,
)
from gpt2_multi.flax.layers import by_rows, check_remat, dense, embed, norm
from gpt2_multi.flax.parameters import axes
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.inputs import check_past
from gpt2_multi.model.outputs import BaseModelOutputWithPastAndCrossAttentions, Output

for output_class in Output.__subclasses__():
    jax.tree_util.register_dataclass(output_class, [*output_class.__dataclass_fields__], [])  # type: ignore[attr-defined]


def gelu(x: Array) -> Array:
    """x Phi(x) (Hendrycks and Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x) (Hendrycks and Gimpel 2016)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "tanh_gelu": jax.nn.gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


class MLP(nn.Module):
    """Two projections with the activation between them, `n_inner` (4 E by default) wide."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = dense(self, self.config.n_inner or 4 * self.config.n_embd, "c_fc")(x)
        x = dense(self, self.config.n_embd, "c_proj")(ACTIVATIONS[self.config.activation](x))
        return nn.Dropout(self.config.resid_pdrop)(x, deterministic=not self.train)


class Seen(NamedTuple):
    """What one block gives besides its output."""

    hidden: Array | None  # its input, (B, T, E)
    probs: Array | None  # (B, H, T, S)
    cross_probs: Array | None
    present: Pair | None
    cross: Pair | None


class Block(nn.Module):
    """Pre-norm transformer block (Radford et al. 2019, section 2.3)."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    train: bool
    heads: int
    attentions: bool  # whether probabilities are to be seen
    hidden: bool  # whether the input is

    @nn.compact
    def __call__(self, x: Array, context: Context, layer: Layer) -> tuple[Array, Seen]:
        options = dict(config=self.config, dtype=self.dtype, param_dtype=self.param_dtype, train=self.train)
        before, cross, cross_probs = (x := by_rows(x)), None, None
        a, probs, present = Attention(**options, heads=self.heads, name="attn")(norm(self, "ln_1")(x), context, layer)
        x = by_rows(x + a)
        if context.states is not None or layer.cross is not None:
            attention = CrossAttention(**options, heads=self.config.n_head, name="crossattention")
            a, cross_probs, cross = attention(norm(self, "ln_cross_attn")(x), context, layer)
            x = x + a
        x = x + MLP(**options, name="mlp")(norm(self, "ln_2")(x))
        wanted = (before if self.hidden else None, *(p if self.attentions else None for p in (probs, cross_probs)))
        cached = (None, None) if layer.past is None else (present, cross)
        return x, Seen._make((*wanted, *cached))


class Blocks(nn.Module):
    """All blocks, one after the other; or, with `scan_layers`, one block whose parameters are stacked.

    Parameters are named `0`, `1` and so on, or `layers`, with a dimension more. `remat` is the name of a policy of
    `jax.checkpoint_policies`: what is not saved by it is computed again in the backward pass.
    """

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    remat: str | None
    scan_layers: bool

    @nn.compact
    def __call__(
        self, x: Array, context: Context, layers: Layer, train: bool, attentions: bool, hidden: bool
    ) -> tuple[Array, Seen]:
        """`layers` holds one entry per layer: stacked arrays where layers are scanned, lists otherwise."""
        options = dict(
            config=self.config, dtype=self.dtype, param_dtype=self.param_dtype,
            train=train, attentions=attentions, hidden=hidden,
        )  # fmt: skip
        block = Block if self.remat is None else rematerialised(self.remat, prevent_cse=not self.scan_layers)
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=self.config.n_layer,
            )
            return scanned(**options, heads=self.config.n_head, name="layers")(x, context, layers)  # type: ignore[return-value]
        seen = []
        for i in range(self.config.n_layer):
            heads = len(self.config.heads(i))
            layer = Layer._make(None if part is None else part[i] for part in layers)
            x, more = block(**options, heads=heads, name=str(i))(x, context, layer)
            seen.append(more)
        return x, Seen._make(None if part[0] is None else part for part in zip(*seen, strict=True))


def rematerialised(policy: str, prevent_cse: bool) -> Any:
    """A block that keeps for the backward pass what a policy of `jax.checkpoint_policies` says."""
    check_remat(policy)
    return nn.remat(Block, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=prevent_cse)


class GPT2Module(nn.Module):
    """The bare GPT-2, as a linen module. It checks nothing that `jit` could not check."""

    config: GPT2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str | None = None
    scan_layers: bool = False

    apply, init, init_with_output = axes.apply, axes.init, axes.init_with_output

    def setup(self) -> None:
        self.wte = embed(self, self.config.vocab_size, "wte")
        self.wpe = embed(self, self.config.n_positions, "wpe")
        self.drop = nn.Dropout(self.config.embd_pdrop)
        self.h = Blocks(self.config, self.dtype, self.param_dtype, self.remat, self.scan_layers)
        self.ln_f = norm(self, "ln_f")

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        encoder_hidden_states: Array | None = None,
        encoder_attention_mask: Array | None = None,
        past_key_values: KVCache | None = None,
        token_type_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The hidden states of (B, T) ids, or of (B, T, E) `inputs_embeds`.

        attention_mask: (B, S), 1 where a token counts, S = T or the cache's capacity; or of rank 4, (B or 1, H or 1,
        T or 1, S), booleans or integers (1 keeps) or floats (added to the scores); no mask shows a token what comes
        after it. position_ids: (B, T) or (1, T); without them a token's position is the count of unmasked tokens before
        it. head_mask: (H,), (n_layer, H) or (n_layer, B, H, T, S). encoder_hidden_states: (B, encoder length, E),
        encoder_attention_mask: (B, encoder length). With `train`, an rng named "dropout" is needed.
        """
        source: Any = input_ids if input_ids is not None else inputs_embeds
        cache = past_key_values
        check_past(cache, cache is None or isinstance(cache, KVCache), self.config.n_layer)
        if position_ids is None:
            position_ids = positions(source, attention_mask, 0 if cache is None else cache.length)
        x = self.embed(source, position_ids, token_type_ids, train)
        context = self._context(x.shape[1], attention_mask, cache, encoder_hidden_states, encoder_attention_mask)
        x, seen = self.h(x, context, self._layers(cache, head_mask), train, output_attentions, output_hidden_states)
        x = self.ln_f(by_rows(x))
        if cache is not None:
            cache = KVCache(seen.present, seen.cross, cache.length + source.shape[1])
        hidden = (*seen.hidden, x) if output_hidden_states else None  # type: ignore[misc]
        probs, cross_probs = (None if part is None else tuple(part) for part in (seen.probs, seen.cross_probs))
        return BaseModelOutputWithPastAndCrossAttentions(x, cache, hidden, probs, cross_probs)

    def embed(self, source: Array, position_ids: Array, types: Array | None, train: bool) -> Array:
        """What the first block reads: (B, T) ids or (B, T, E) embeddings -> (B, T, E)"""
        is_ids = jnp.issubdtype(source.dtype, jnp.integer)
        x = (self.wte(source) if is_ids else source.astype(self.dtype)) + self.wpe(position_ids)
        return self.drop(x if types is None else x + self.wte(types), deterministic=not train)

    def logits(self, hidden: Array) -> Array:
        """The tied head: (..., E) -> (..., V)"""
        return by_rows(self.wte.attend(hidden), PartitionSpec.UNCONSTRAINED)

    def _context(
        self, length: int, mask: Array | None, cache: KVCache | None, states: Array | None, states_mask: Array | None
    ) -> Context:
        past, keys = (0, length) if cache is None else (cache.length, cache.capacity)
        bias = causal_bias(length, keys, past, mask, self.dtype)
        return Context(bias, past, states, None if states_mask is None else key_bias(states_mask, self.dtype))

    def _layers(self, cache: KVCache | None, head_mask: Array | None) -> Layer:
        config = self.config
        scales = [config.score_scale(i) for i in range(config.n_layer)]
        masks = None if head_mask is None else self._head_masks(head_mask.astype(self.dtype))
        past, cross = (None, None) if cache is None else (cache.layers, cache.cross)
        if not self.scan_layers:
            return Layer(scales, masks, past, cross)
        return Layer(jnp.asarray(scales), None if masks is None else jnp.stack(masks), past, cross)

    def _head_masks(self, head_mask: Array) -> list[Array]:
        """One (B or 1, heads, T or 1, S or 1) mask per layer, without its pruned heads."""
        config = self.config
        if head_mask.ndim != 5:
            head_mask = jnp.broadcast_to(head_mask, (config.n_layer, config.n_head))[:, None, :, None, None]
        return [m if m.shape[1] == 1 else m[:, jnp.asarray(config.heads(i))] for i, m in enumerate(head_mask)]
