"""The heads of GPT-2 in TensorFlow: language model, double heads, classification of texts and tokens, answers.

Every `call` takes what `TFGPT2Model.call` takes, under the names and in the order of transformers 4.57, and labels;
see there for shapes and errors. `return_dict=False` gives a tuple of the fields that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.outputs import (
    CausalLMOutputWithCrossAttentions,
    GPT2DoubleHeadsModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from gpt2_multi.tf.attention import KVCache, Pair
from gpt2_multi.tf.fit.policies import Policy
from gpt2_multi.tf.generation import generate as generation
from gpt2_multi.tf.layers import QuantizedEmbedding, dense, dropout, facts, made, projection, sizes
from gpt2_multi.tf.loading import TFGPT2PreTrainedModel
from gpt2_multi.tf.model import ACTIVATIONS, TFGPT2Model, give
from gpt2_multi.tf.serve import export
from gpt2_multi.tf.training import chunk_count, classification_loss, cross_entropy, head_loss, lm_loss, span_loss


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2LMHeadModel(TFGPT2PreTrainedModel):
    """GPT-2 with the language-model head, tied to the token embedding unless the configuration says otherwise."""

    head = "lm"
    output_class = CausalLMOutputWithCrossAttentions
    generation_config: GenerationConfig

    def __init__(self, config: GPT2Config, *, dtype: Policy = None, param_dtype: Any = None, **options: Any) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        config = self.config
        self.transformer = TFGPT2Model(config, dtype=self.dtype_policy, name="transformer")
        if not config.tie_word_embeddings:
            head = partial(projection, config, config.n_embd, config.vocab_size, "lm_head", self.dtype_policy)
            self.lm_head = head(use_bias=False)
        self.generation_config = GenerationConfig.of(config)
        self.initialise()

    generate = generation.generate
    score = generation.score
    stream = generation.stream
    stream_tokens = generation.stream_tokens
    export_saved_model = export.export_saved_model

    def logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """Logits over the vocabulary: (..., E) -> (..., V)"""
        return lm_logits(self, hidden)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows."""
        return self.transformer.init_cache(batch_size, max_length)

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        past_key_values: KVCache | Sequence[Pair] | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        encoder_hidden_states: tf.Tensor | None = None,
        encoder_attention_mask: tf.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: tf.Tensor | None = None,
        training: bool = False,
        logits_to_keep: int = 0,
        skip_logits: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Logits (B, T, V) of the next token; with labels (B, T), shifted here, their loss.

        The loss of many logits in training has them in chunks within a function that is traced, which leaves out
        `logits` that nobody reads. `skip_logits` True gives none, False has the loss computed from them, as where its
        second derivative is wanted. `logits_to_keep` n computes those of the last n positions only (0: of all).
        """
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            encoder_hidden_states, encoder_attention_mask, use_cache, output_attentions, output_hidden_states, True,
            training,
        )  # fmt: skip
        inputs.check_kept(logits_to_keep)
        hidden = outputs.last_hidden_state[:, -logits_to_keep:]
        mask = None if labels is None else present(attention_mask, labels)
        loss, logits = answer(self, hidden, labels, mask, skip_logits, training)
        output = CausalLMOutputWithCrossAttentions(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions, outputs.cross_attentions
        )
        return give(self.config, output, return_dict)


class SequenceSummary(keras.layers.Layer):
    """One vector per choice, at the token that `summary_type` names, projected to its score."""

    def __init__(self, config: GPT2Config, **options: Any) -> None:
        super().__init__(**options)
        self.config = config
        if config.summary_use_proj:
            outputs = 1 if config.summary_proj_to_labels else config.n_embd
            self.summary = dense(config.n_embd, outputs, "summary", self.dtype_policy)
        self.dropout = keras.layers.Dropout(config.summary_first_dropout, dtype=self.dtype_policy)
        made(self, None, None, None, config.n_embd)

    def call(self, hidden: tf.Tensor, keep: tf.Tensor, mc_token_ids: tf.Tensor | None = None) -> tf.Tensor:
        """(B, C, T, E) hidden states and (B, C, T) mask -> (B, C, 1), or (B, C, E) without `summary_proj_to_labels`."""
        x = self.dropout(self._pool(hidden, keep, mc_token_ids))
        x = self.summary(x) if self.config.summary_use_proj else x
        return ACTIVATIONS[self.config.summary_function](x) if self.config.summary_function else x

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """That of what it gives of hidden states of this shape."""
        outputs = self.summary.units if self.config.summary_use_proj else input_shape[-1]
        return (*input_shape[:2], outputs)

    def _pool(self, hidden: tf.Tensor, mask: tf.Tensor, mc_token_ids: tf.Tensor | None) -> tf.Tensor:
        kind = self.config.summary_type
        if kind == "mean":
            weights = tf.cast(tf.cast(mask, tf.bool), hidden.dtype)[..., None]
            return tf.reduce_sum(hidden * weights, -2) / tf.maximum(tf.reduce_sum(weights, -2), 1)
        index = mc_token_ids if kind == "cls_index" and mc_token_ids is not None else last_tokens(mask)
        if kind == "first":
            index = tf.argmax(tf.cast(tf.cast(mask, tf.bool), tf.int32), -1)
        return tf.gather(hidden, index, axis=2, batch_dims=2)


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2DoubleHeadsModel(TFGPT2PreTrainedModel):
    """GPT-2 with the language-model head and a multiple-choice head."""

    head = "double_heads"
    output_class = GPT2DoubleHeadsModelOutput
    label_names = ("labels", "mc_labels")
    logit_names = ("logits", "mc_logits")
    logit_axes = "BCTV"

    def __init__(self, config: GPT2Config, *, dtype: Policy = None, param_dtype: Any = None, **options: Any) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        config = self.config
        self.transformer = TFGPT2Model(config, dtype=self.dtype_policy, name="transformer")
        if not config.tie_word_embeddings:
            head = partial(projection, config, config.n_embd, config.vocab_size, "lm_head", self.dtype_policy)
            self.lm_head = head(use_bias=False, rank=4)
        self.multiple_choice_head = SequenceSummary(config, dtype=self.dtype_policy, name="multiple_choice_head")
        self.generation_config = GenerationConfig.of(config)
        self.initialise()

    generate = generation.generate
    score = generation.score
    stream = generation.stream
    stream_tokens = generation.stream_tokens

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows."""
        return self.transformer.init_cache(batch_size, max_length)

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        past_key_values: KVCache | Sequence[Pair] | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        mc_token_ids: tf.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: tf.Tensor | None = None,
        mc_labels: tf.Tensor | None = None,
        training: bool = False,
        skip_logits: bool | None = None,
    ) -> GPT2DoubleHeadsModelOutput | tuple[Any, ...]:
        """Logits (B, C, T, V) and scores (B, C) of C choices, given as (B, C, T) ids, mask, types and positions.

        mc_token_ids: (B, C), the token that is scored, by default the last one that the mask keeps. labels: (B, C, T),
        shifted here. mc_labels: (B,), the right choice. `skip_logits` is as in `TFGPT2LMHeadModel.call`.
        """
        source: Any = input_ids if input_ids is not None else inputs_embeds
        inputs.check_given(input_ids, inputs_embeds)
        inputs.check_choices(facts("input_ids", source).shape, 4 if input_ids is None else 3)
        choices = sizes(source)[:3]
        outputs = self.transformer(
            rows(input_ids), past_key_values, rows(attention_mask), rows(token_type_ids), rows(position_ids), head_mask,
            rows(inputs_embeds), None, None, use_cache, output_attentions, output_hidden_states, True, training,
        )  # fmt: skip
        hidden = tf.reshape(outputs.last_hidden_state, (*choices, self.config.n_embd))  # (B, C, T, E)
        mask = tf.ones(choices, tf.int32) if attention_mask is None else attention_mask[..., -choices[2] :]
        if mc_token_ids is not None:
            inputs.check_choice_tokens(facts("mc_token_ids", mc_token_ids), source.shape[:3])
        loss, logits = answer(self, hidden, labels, mask, skip_logits, training)
        scores = self.multiple_choice_head(hidden, keep=mask, mc_token_ids=mc_token_ids)
        scores = tf.squeeze(scores, -1) if scores.shape[-1] == 1 else scores
        output = GPT2DoubleHeadsModelOutput(
            loss, None if mc_labels is None else cross_entropy(scores, mc_labels),
            logits, scores, outputs.past_key_values, outputs.hidden_states, outputs.attentions,
        )  # fmt: skip
        return give(self.config, output, return_dict)


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2ForSequenceClassification(TFGPT2PreTrainedModel):
    """GPT-2 with a classifier of the whole text, at its last token."""

    head = "sequence_classification"
    output_class = SequenceClassifierOutputWithPast
    logit_axes = "BL"

    def __init__(self, config: GPT2Config, *, dtype: Policy = None, param_dtype: Any = None, **options: Any) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        config = self.config
        self.transformer = TFGPT2Model(config, dtype=self.dtype_policy, name="transformer")
        self.score = dense(config.n_embd, config.num_labels, "score", self.dtype_policy, use_bias=False, rank=2)
        self.initialise()

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        past_key_values: KVCache | Sequence[Pair] | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: tf.Tensor | None = None,
        training: bool = False,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits (B, L) at the last token that the mask keeps; without a mask, the last one that is not `pad_token_id`.

        labels: (B,) classes, or (B, L) floats for several labels, or (B,) floats for regression (L = 1).
        """
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            None, None, use_cache, output_attentions, output_hidden_states, True, training,
        )  # fmt: skip
        hidden = outputs.last_hidden_state  # (B, T, E)
        end = last_tokens(self._kept(hidden, input_ids, attention_mask))  # (B,)
        logits = self.score(tf.gather(hidden, end, axis=1, batch_dims=1))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return give(self.config, output, return_dict)

    def _kept(self, hidden: tf.Tensor, input_ids: tf.Tensor | None, mask: tf.Tensor | None) -> tf.Tensor:
        batch, length, _ = sizes(hidden)
        if mask is not None and mask.shape.rank == 2:
            return mask[:, -length:]
        can_find_end = input_ids is not None and self.config.pad_token_id is not None
        inputs.check_pooling(2 if hidden.shape[0] is None else hidden.shape[0], can_find_end)
        return input_ids != self.config.pad_token_id if can_find_end else tf.ones((batch, length), tf.int32)


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2ForTokenClassification(TFGPT2PreTrainedModel):
    """GPT-2 with a classifier of each token."""

    head = "token_classification"
    output_class = TokenClassifierOutput
    logit_axes = "BTL"

    def __init__(self, config: GPT2Config, *, dtype: Policy = None, param_dtype: Any = None, **options: Any) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        config = self.config
        self.transformer = TFGPT2Model(config, dtype=self.dtype_policy, name="transformer")
        self.dropout = dropout(config.classifier_dropout, config.n_embd, "dropout", self.dtype_policy)
        self.classifier = dense(config.n_embd, config.num_labels, "classifier", self.dtype_policy)
        self.initialise()

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        past_key_values: KVCache | Sequence[Pair] | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: tf.Tensor | None = None,
        training: bool = False,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits (B, T, L); labels: (B, T), of which -100 and masked ones do not count."""
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            None, None, use_cache, output_attentions, output_hidden_states, True, training,
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits, labels, present(attention_mask, labels))
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return give(self.config, output, return_dict)


@keras.saving.register_keras_serializable("gpt2_multi")
class TFGPT2ForQuestionAnswering(TFGPT2PreTrainedModel):
    """GPT-2 with a head that marks where an answer starts and ends."""

    head = "question_answering"
    output_class = QuestionAnsweringModelOutput
    label_names = ("start_positions", "end_positions")
    logit_names = ("start_logits", "end_logits")
    logit_axes = "BT"

    def __init__(self, config: GPT2Config, *, dtype: Policy = None, param_dtype: Any = None, **options: Any) -> None:
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, **options)
        config = self.config
        self.transformer = TFGPT2Model(config, dtype=self.dtype_policy, name="transformer")
        self.qa_outputs = dense(config.n_embd, 2, "qa_outputs", self.dtype_policy)
        self.initialise()

    def call(
        self,
        input_ids: tf.Tensor | None = None,
        attention_mask: tf.Tensor | None = None,
        token_type_ids: tf.Tensor | None = None,
        position_ids: tf.Tensor | None = None,
        head_mask: tf.Tensor | None = None,
        inputs_embeds: tf.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        start_positions: tf.Tensor | None = None,
        end_positions: tf.Tensor | None = None,
        training: bool = False,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Logits (B, T) of the answer's first and last token; positions: (B,), of which those beyond T do not count."""
        outputs = self.transformer(
            input_ids, None, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            None, None, False, output_attentions, output_hidden_states, True, training,
        )  # fmt: skip
        start, end = tf.unstack(self.qa_outputs(outputs.last_hidden_state), axis=-1)  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        output = QuestionAnsweringModelOutput(loss, start, end, outputs.hidden_states, outputs.attentions)
        return give(self.config, output, return_dict)


def lm_logits(model: TFGPT2PreTrainedModel, hidden: tf.Tensor) -> tf.Tensor:
    """Logits over the vocabulary, by the token embedding unless the head is untied: (..., E) -> (..., V)"""
    if not model.config.tie_word_embeddings:
        return model.lm_head(hidden)
    wte = model.transformer.wte
    if isinstance(wte, QuantizedEmbedding):
        return wte.attend(hidden)
    if wte.quantization_mode is not None:
        return wte(hidden, reverse=True)
    kernel = tf.cast(wte.embeddings, hidden.dtype)  # Keras would transpose a copy
    tokens = tf.reshape(hidden, (-1, kernel.shape[1]))  # or each row of a batch would have a gradient (V, E) of its own
    return tf.reshape(tf.matmul(tokens, kernel, transpose_b=True), (*sizes(hidden)[:-1], kernel.shape[0]))


def answer(
    model: Any, hidden: tf.Tensor, labels: tf.Tensor | None, mask: tf.Tensor | None, skip_logits: bool | None,
    training: bool,
) -> tuple[tf.Tensor | None, tf.Tensor | None]:  # fmt: skip
    """The loss of labels, if there are any, and the logits; see `TFGPT2LMHeadModel.call`."""
    compute = getattr(model, "logits", partial(lm_logits, model))
    if labels is None:
        inputs.check_skipped(skip_logits)
        return None, compute(hidden)
    is_left_out = skip_logits or (training and not tf.executing_eagerly() and skip_logits is None)
    if not (is_left_out and is_chunked(model, hidden)):
        logits = compute(hidden)
        return lm_loss(logits, labels, mask), None if skip_logits else logits
    loss = head_loss(hidden, head_weight(model), labels, mask, trained(model), training)
    return loss, None if skip_logits else compute(hidden)


def is_chunked(model: Any, hidden: tf.Tensor) -> bool:
    """Whether the loss computes logits by itself: many, of a head that nobody has replaced, adapted or quantized."""
    own, head = TFGPT2LMHeadModel.logits, head_of(model)
    if getattr(getattr(model, "logits", None), "__func__", own) is not own or not is_plain(head, hidden):
        return False
    count = chunk_count(hidden, model.config.vocab_size)
    return tf.is_tensor(count) or count > 1


def is_plain(head: Any, hidden: tf.Tensor) -> bool:
    """Whether a head multiplies by its weight and does nothing else."""
    if head.quantization_mode is not None or head.compute_dtype != hidden.dtype.name or "call" in vars(head):
        return False
    if type(head) is keras.layers.Dense:
        return head.bias is None and head.activation is keras.activations.linear and head.activity_regularizer is None
    return type(head) is keras.layers.ReversibleEmbedding


def head_of(model: Any) -> Any:
    """The layer that has the head's weight."""
    return model.transformer.wte if model.config.tie_word_embeddings else model.lm_head


def head_weight(model: Any) -> tf.Tensor:
    """The head's weight, (V, E)."""
    head = head_of(model)
    return tf.convert_to_tensor(head.embeddings) if model.config.tie_word_embeddings else tf.transpose(head.kernel)


def trained(model: Any) -> tuple[bool, bool]:
    """Whether what is below the head trains, and the head itself: eagerly, where nothing is left out, both may."""
    parts = model.transformer, head_of(model)
    below, head = (tf.executing_eagerly() or bool(part.trainable_variables) for part in parts)
    return below, head


def present(mask: tf.Tensor | None, labels: tf.Tensor) -> tf.Tensor | None:
    """The part of a (B, past + T) mask that labels (B, T) stand under; a mask of rank 4 says nothing about labels."""
    return mask[:, -sizes(labels)[1] :] if mask is not None and mask.shape.rank == 2 else None


def last_tokens(mask: tf.Tensor) -> tf.Tensor:
    """The index of the last unmasked token of each row: (..., T) -> (...)"""
    inputs.check_pooled(mask.shape[-1])
    kept = tf.cast(tf.cast(tf.reverse(mask, [-1]), tf.bool), tf.int32)
    return sizes(mask)[-1] - 1 - tf.argmax(kept, -1, output_type=tf.int32)


def rows(x: tf.Tensor | None) -> tf.Tensor | None:
    """Choices as rows of a batch: (B, C, ...) -> (B * C, ...)"""
    if x is None:
        return None
    batch, choices, *rest = sizes(x)
    return tf.reshape(x, (batch * choices, *rest))  # which is known, as -1 is not beside a length that is unknown
