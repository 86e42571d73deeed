"""The heads of GPT-2 in Flax: language model, double heads, sequence and token classification, question answering.

Each is a linen module, which stands alone, and takes what `GPT2Module` takes, and labels; see there for shapes.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from gpt2_multi.flax.attention import KVCache
from gpt2_multi.flax.layers import are_stock, dense, interceptors, is_traced
from gpt2_multi.flax.model import ACTIVATIONS, GPT2Module
from gpt2_multi.flax.parameters import axes
from gpt2_multi.flax.training.losses import (
    chunk_count,
    classification_loss,
    cross_entropy,
    head_loss,
    lm_loss,
    span_loss,
)
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.outputs import (
    CausalLMOutputWithCrossAttentions,
    GPT2DoubleHeadsModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)


class Headed(nn.Module):
    """A module around the bare one, which is its `transformer`."""

    config: GPT2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str | None = None
    scan_layers: bool = False

    apply, init, init_with_output = axes.apply, axes.init, axes.init_with_output

    def body(self) -> GPT2Module:
        """The bare module inside."""
        return GPT2Module(self.config, self.dtype, self.param_dtype, self.remat, self.scan_layers, name="transformer")

    def logits(self, body: GPT2Module, hidden: Array) -> Array:
        """Logits over the vocabulary, by the token embedding unless the head is untied: (..., E) -> (..., V)"""
        if self.config.tie_word_embeddings:
            return body.logits(hidden)
        return dense(self, self.config.vocab_size, "lm_head", head="lm", use_bias=False)(hidden)

    def answer(
        self, body: GPT2Module, hidden: Array, labels: Array | None, mask: Array | None, skip_logits: bool | None
    ) -> tuple[Array | None, Array | None]:
        """The loss of labels, if there are any, and the logits; see `GPT2LMHeadModule.__call__`."""
        if labels is None:
            inputs.check_skipped(skip_logits)
            return None, self.logits(body, hidden)
        if skip_logits is not False and self.is_chunked(body, hidden, skip_logits):
            loss = head_loss(hidden, self.weight(body), labels, mask, self.dtype)
            return loss, None if skip_logits else self.logits(body, hidden)
        logits = self.logits(body, hidden)
        return lm_loss(logits, labels, mask), None if skip_logits else logits

    def is_chunked(self, body: GPT2Module, hidden: Array, skip_logits: bool | None) -> bool:
        """Whether the loss computes logits by itself: many, of a head that is ours and there, on one device."""
        is_own = type(self).logits is Headed.logits and type(body).logits is GPT2Module.logits and not interceptors()
        is_own = is_own and type(body.wte) is nn.Embed and are_stock()
        is_compiled = skip_logits or is_traced(hidden)  # where logits that nobody reads are left out
        is_alone = jax.sharding.get_abstract_mesh().size <= 1
        is_there = self.config.tie_word_embeddings or self.has_variable("params", "lm_head")  # it may yet be made
        can_be = is_own and is_compiled and is_alone and is_there
        return can_be and chunk_count(hidden, self.config.vocab_size) > 1

    def weight(self, body: GPT2Module) -> Array:
        """The head's weight, (V, E)."""
        if self.config.tie_word_embeddings:
            return body.wte.embedding
        return self.get_variable("params", "lm_head")["kernel"].T


class GPT2LMHeadModule(Headed):
    """GPT-2 with the language-model head, tied to the token embedding unless the configuration says otherwise."""

    @nn.compact
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
        labels: Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits (B, T, V) of the next token. labels: (B, T), shifted here, for the loss.

        The loss of many logits, traced, has them in chunks; `jit` leaves out `logits` that nobody reads. `skip_logits`
        True gives none, False has the loss computed from them, as where its second derivative is wanted.
        `logits_to_keep` n computes those of the last n positions only (0: of all).
        """
        inputs.check_kept(logits_to_keep)
        body = self.body()
        outputs = body(
            input_ids, attention_mask, position_ids, encoder_hidden_states, encoder_attention_mask, past_key_values,
            token_type_ids, head_mask, inputs_embeds, train, output_attentions, output_hidden_states,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        mask = None if labels is None else present(attention_mask, labels)
        loss, logits = self.answer(body, hidden[:, -logits_to_keep:], labels, mask, skip_logits)
        return CausalLMOutputWithCrossAttentions(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions, outputs.cross_attentions
        )


class SequenceSummary(nn.Module):
    """One vector per choice, at the token that `summary_type` names, projected to its score."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any
    train: bool

    @nn.compact
    def __call__(self, hidden: Array, mask: Array, mc_token_ids: Array | None) -> Array:
        """(B, C, T, E) hidden states and (B, C, T) mask -> (B, C, 1), or (B, C, E) without `summary_proj_to_labels`."""
        config = self.config
        x = nn.Dropout(config.summary_first_dropout)(
            self._pool(hidden, mask, mc_token_ids), deterministic=not self.train
        )
        if config.summary_use_proj:
            x = dense(self, 1 if config.summary_proj_to_labels else config.n_embd, "summary", head="double_heads")(x)
        return ACTIVATIONS[config.summary_function](x) if config.summary_function else x

    def _pool(self, hidden: Array, mask: Array, mc_token_ids: Array | None) -> Array:
        kind = self.config.summary_type
        if kind == "mean":
            weights = mask.astype(bool).astype(hidden.dtype)[..., None]
            return (hidden * weights).sum(-2) / jnp.maximum(weights.sum(-2), 1)
        index = mc_token_ids if kind == "cls_index" and mc_token_ids is not None else last_tokens(mask)
        if kind == "first":
            index = jnp.argmax(mask.astype(bool), -1)
        return jnp.take_along_axis(hidden, index[..., None, None], -2).squeeze(-2)


class GPT2DoubleHeadsModule(Headed):
    """GPT-2 with the language-model head and a multiple-choice head."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: KVCache | None = None,
        token_type_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        mc_token_ids: Array | None = None,
        labels: Array | None = None,
        mc_labels: Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        skip_logits: bool | None = None,
    ) -> GPT2DoubleHeadsModelOutput:
        """Logits (B, C, T, V) and scores (B, C) of C choices, given as (B, C, T) ids, mask, types and positions.

        mc_token_ids: (B, C), the token that is scored, by default the last one that the mask keeps. labels: (B, C, T),
        shifted here. mc_labels: (B,), the right choice. `skip_logits` is as in `GPT2LMHeadModule`.
        """
        body = self.body()
        source: Any = input_ids if input_ids is not None else inputs_embeds
        choices = source.shape[:3]
        outputs = body(
            rows(input_ids), rows(attention_mask), rows(position_ids), None, None, past_key_values,
            rows(token_type_ids), head_mask, rows(inputs_embeds), train, output_attentions, output_hidden_states,
        )  # fmt: skip
        hidden = outputs.last_hidden_state.reshape(*choices, self.config.n_embd)  # (B, C, T, E)
        mask = jnp.ones(choices, bool) if attention_mask is None else attention_mask[..., -choices[2] :]
        loss, logits = self.answer(body, hidden, labels, mask, skip_logits)
        summary = SequenceSummary(self.config, self.dtype, self.param_dtype, train, name="multiple_choice_head")
        scores = summary(hidden, mask, mc_token_ids)
        scores = scores.squeeze(-1) if scores.shape[-1] == 1 else scores
        return GPT2DoubleHeadsModelOutput(
            loss, None if mc_labels is None else cross_entropy(scores, mc_labels),
            logits, scores, outputs.past_key_values, outputs.hidden_states, outputs.attentions,
        )  # fmt: skip


class GPT2ForSequenceClassificationModule(Headed):
    """GPT-2 with a classifier of the whole text, at its last token."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: KVCache | None = None,
        token_type_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, L) at the last token that the mask keeps; without a mask, the last one that is not `pad_token_id`.

        labels: (B,) classes, or (B, L) floats for several labels, or (B,) floats for regression (L = 1).
        """
        outputs = self.body()(
            input_ids, attention_mask, position_ids, None, None, past_key_values,
            token_type_ids, head_mask, inputs_embeds, train, output_attentions, output_hidden_states,
        )  # fmt: skip
        hidden = outputs.last_hidden_state  # (B, T, E)
        end = last_tokens(self._kept(hidden, input_ids, attention_mask))  # (B,)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], 1).squeeze(1)  # (B, E)
        score = dense(self, self.config.num_labels, "score", head="sequence_classification", use_bias=False)
        logits = score(pooled)
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )

    def _kept(self, hidden: Array, input_ids: Array | None, mask: Array | None) -> Array:
        if mask is not None and mask.ndim == 2:
            return mask[:, -hidden.shape[1] :]
        can_find_end = input_ids is not None and self.config.pad_token_id is not None
        inputs.check_pooling(hidden.shape[0], can_find_end)
        return input_ids != self.config.pad_token_id if can_find_end else jnp.ones(hidden.shape[:2], bool)  # type: ignore[return-value]


class GPT2ForTokenClassificationModule(Headed):
    """GPT-2 with a classifier of each token."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: KVCache | None = None,
        token_type_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> TokenClassifierOutput:
        """Logits (B, T, L); labels: (B, T), of which -100 and masked ones do not count."""
        outputs = self.body()(
            input_ids, attention_mask, position_ids, None, None, past_key_values,
            token_type_ids, head_mask, inputs_embeds, train, output_attentions, output_hidden_states,
        )  # fmt: skip
        hidden = nn.Dropout(self.config.classifier_dropout)(outputs.last_hidden_state, deterministic=not train)
        logits = dense(self, self.config.num_labels, "classifier", head="token_classification")(hidden)
        loss = None if labels is None else cross_entropy(logits, labels, present(attention_mask, labels))
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class GPT2ForQuestionAnsweringModule(Headed):
    """GPT-2 with a head that marks where an answer starts and ends."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
        head_mask: Array | None = None,
        inputs_embeds: Array | None = None,
        start_positions: Array | None = None,
        end_positions: Array | None = None,
        train: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> QuestionAnsweringModelOutput:
        """Logits (B, T) of the answer's first and last token; positions: (B,), of which those beyond T do not count."""
        outputs = self.body()(
            input_ids, attention_mask, position_ids, None, None, None,
            token_type_ids, head_mask, inputs_embeds, train, output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = dense(self, 2, "qa_outputs", head="question_answering")(outputs.last_hidden_state)
        start, end = logits[..., 0], logits[..., 1]  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start, end, outputs.hidden_states, outputs.attentions)


def present(mask: Array | None, labels: Array) -> Array | None:
    """The part of a (B, past + T) mask that labels (B, T) stand under; a mask of rank 4 says nothing about labels."""
    return mask[:, -labels.shape[1] :] if mask is not None and mask.ndim == 2 else None


def last_tokens(mask: Array) -> Array:
    """The index of the last unmasked token of each row: (..., T) -> (...)"""
    inputs.check_pooled(mask.shape[-1])
    return mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1].astype(bool), -1)


def rows(x: Array | None) -> Array | None:
    """Choices as rows of a batch: (B, C, ...) -> (B * C, ...)"""
    return None if x is None else x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
