"""The heads of GPT-2 in PyTorch: language model, double heads, sequence and token classification, question answering.

Every `forward` takes what `GPT2Model.forward` takes, under the names and in the order of transformers 4.57, and labels;
see there for shapes and errors. `return_dict=False` gives a tuple of the fields that are there.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
from gpt2_multi.pt.attention import KVCache, whole
from gpt2_multi.pt.generation import generate as generation
from gpt2_multi.pt.generation.cpu_kernels import known
from gpt2_multi.pt.generation.decoding import (
    _update_model_kwargs_for_generation,
    compute_transition_scores,
    prepare_inputs_for_generation,
)
from gpt2_multi.pt.layers import facts, is_own, is_unchanged, project, projection
from gpt2_multi.pt.loading import GPT2PreTrainedModel
from gpt2_multi.pt.model import ACTIVATIONS, GPT2Model, give, old_calls, recast
from gpt2_multi.pt.state import check_tied, is_replicated, lend_embedding, local
from gpt2_multi.pt.training import (
    chunk_rows,
    classification_loss,
    cross_entropy,
    head_loss,
    later_logits,
    lm_loss,
    span_loss,
    trained,
)

Dtype = torch.dtype | str | None
Items = Tensor | int | None


@known
class GPT2LMHeadModel(GPT2PreTrainedModel):
    """GPT-2 with the language-model head, tied to the token embedding unless the configuration says otherwise."""

    head = "lm"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # as Trainer calls losses that shift labels
    generation_config: GenerationConfig

    def __init__(
        self, config: GPT2Config, *, dtype: Dtype = None, param_dtype: Dtype = None, attn_implementation: str = "sdpa"
    ) -> None:
        super().__init__(config, dtype)
        config = self.config
        with self.building(param_dtype):
            self.transformer = GPT2Model(config, dtype=dtype, attn_implementation=attn_implementation)
            self.lm_head = projection(config, config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.generation_config = GenerationConfig.of(config)

    generate = generation.generate
    score = generation.score
    stream = generation.stream
    stream_tokens = generation.stream_tokens
    prepare_inputs_for_generation = prepare_inputs_for_generation
    _update_model_kwargs_for_generation = _update_model_kwargs_for_generation
    compute_transition_scores = compute_transition_scores

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary: (..., E) -> (..., V)"""
        return lm_logits(self, hidden)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows, written in place by each call."""
        return self.body.init_cache(batch_size, max_length)

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Items = None,
        skip_logits: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Logits (B, T, V) of the next token; with labels (B, T), shifted here, their loss.

        With labels, logits that take much memory are computed when they are first read, which has to be before the
        weights change; the loss has them in chunks. `skip_logits` False computes them now, True never.
        `logits_to_keep` n computes those of the last n positions only (0: of all), a tensor (n,) those of its places.
        `num_items_in_batch` is how many labels count in all parts of a batch that is read in parts, whose losses then
        add up to its mean.
        """
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            encoder_hidden_states, encoder_attention_mask, use_cache, output_attentions, output_hidden_states, True,
        )  # fmt: skip
        hidden = kept(outputs.last_hidden_state, logits_to_keep)
        mask = None if labels is None else present(attention_mask, labels)
        loss, logits = answer(self, hidden, labels, mask, num_items_in_batch, skip_logits, return_dict)
        output = CausalLMOutputWithCrossAttentions(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions, outputs.cross_attentions
        )
        return give(self.config, output, return_dict)


@known
class SequenceSummary(nn.Module):
    """One vector per choice, at the token that `summary_type` names, projected to its score."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        if config.summary_use_proj:
            self.summary = nn.Linear(config.n_embd, 1 if config.summary_proj_to_labels else config.n_embd)
        self.dropout = nn.Dropout(config.summary_first_dropout)

    def forward(self, hidden: Tensor, mask: Tensor, mc_token_ids: Tensor | None) -> Tensor:
        """(B, C, T, E) hidden states and (B, C, T) mask -> (B, C, 1), or (B, C, E) without `summary_proj_to_labels`."""
        x = self.dropout(self._pool(hidden, mask, mc_token_ids))
        x = self.summary(x) if self.config.summary_use_proj else x
        return ACTIVATIONS[self.config.summary_function](x) if self.config.summary_function else x

    def _pool(self, hidden: Tensor, mask: Tensor, mc_token_ids: Tensor | None) -> Tensor:
        kind = self.config.summary_type
        if kind == "mean":
            weights = (mask != 0).to(hidden.dtype)[..., None]
            return (hidden * weights).sum(-2) / weights.sum(-2).clamp(min=1)
        index = mc_token_ids if kind == "cls_index" and mc_token_ids is not None else last_tokens(mask)
        if kind == "first":
            index = (mask != 0).int().argmax(-1)
        return at(hidden, index.view(hidden.shape[:2]))


@known
class GPT2DoubleHeadsModel(GPT2PreTrainedModel):
    """GPT-2 with the language-model head and a multiple-choice head."""

    head = "double_heads"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    generation_config: GenerationConfig

    def __init__(
        self, config: GPT2Config, *, dtype: Dtype = None, param_dtype: Dtype = None, attn_implementation: str = "sdpa"
    ) -> None:
        super().__init__(config, dtype)
        config = self.config
        with self.building(param_dtype):
            self.transformer = GPT2Model(config, dtype=dtype, attn_implementation=attn_implementation)
            self.lm_head = projection(config, config.n_embd, config.vocab_size, bias=False)
            self.multiple_choice_head = SequenceSummary(config)
        self.tie_weights()
        self.generation_config = GenerationConfig.of(config)

    generate = generation.generate
    score = generation.score
    stream = generation.stream
    stream_tokens = generation.stream_tokens

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache with room for `max_length` tokens of `batch_size` rows, written in place by each call."""
        return self.transformer.init_cache(batch_size, max_length)

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
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        skip_logits: bool | None = None,
    ) -> GPT2DoubleHeadsModelOutput | tuple[Any, ...]:
        """Logits (B, C, T, V) and scores (B, C) of C choices, given as (B, C, T) ids, mask, types and positions.

        mc_token_ids: (B, C), the token that is scored, by default the last one that the mask keeps. labels: (B, C, T),
        shifted here. mc_labels: (B,), the right choice. `skip_logits` is as in `GPT2LMHeadModel.forward`.
        """
        source = input_ids if input_ids is not None else inputs_embeds
        inputs.check_given(input_ids, inputs_embeds)
        inputs.check_choices(source.shape, 4 if input_ids is None else 3)  # type: ignore[union-attr]
        choices = source.shape[:3]  # type: ignore[union-attr]
        outputs = self.transformer(
            rows(input_ids), past_key_values, rows(attention_mask), rows(token_type_ids), rows(position_ids), head_mask,
            rows(inputs_embeds), None, None, use_cache, output_attentions, output_hidden_states, True,
        )  # fmt: skip
        hidden = outputs.last_hidden_state.view(*choices, self.config.n_embd)  # (B, C, T, E)
        mask = hidden.new_ones(choices) if attention_mask is None else attention_mask[..., -choices[-1] :]
        if mc_token_ids is not None:
            inputs.check_choice_tokens(facts("mc_token_ids", mc_token_ids), choices)
        loss, logits = answer(self, hidden, labels, mask, None, skip_logits, return_dict)
        scores = recast(self.multiple_choice_head, self.compute_dtype, hidden, mask, mc_token_ids).squeeze(-1)
        output = GPT2DoubleHeadsModelOutput(
            loss, None if mc_labels is None else cross_entropy(scores, mc_labels),
            logits, scores, outputs.past_key_values, outputs.hidden_states, outputs.attentions,
        )  # fmt: skip
        return give(self.config, output, return_dict)


class GPT2ForSequenceClassification(GPT2PreTrainedModel):
    """GPT-2 with a classifier of the whole text, at its last token."""

    head = "sequence_classification"
    accepts_loss_kwargs = True

    def __init__(
        self, config: GPT2Config, *, dtype: Dtype = None, param_dtype: Dtype = None, attn_implementation: str = "sdpa"
    ) -> None:
        super().__init__(config, dtype)
        config = self.config
        with self.building(param_dtype):
            self.transformer = GPT2Model(config, dtype=dtype, attn_implementation=attn_implementation)
            self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Items = None,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits (B, L) at the last token that the mask keeps; without a mask, the last one that is not `pad_token_id`.

        labels: (B,) classes, or (B, L) floats for several labels, or (B,) floats for regression (L = 1).
        """
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            None, None, use_cache, output_attentions, output_hidden_states, True,
        )  # fmt: skip
        hidden = outputs.last_hidden_state  # (B, T, E)
        end = last_tokens(self._kept(hidden, input_ids, attention_mask))  # (B,)
        pooled = at(hidden, end)  # (B, E)
        logits = whole("score", recast(self.score, self.compute_dtype, pooled), self.config.num_labels)
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, num_items_in_batch)
        output = SequenceClassifierOutputWithPast(
            loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions
        )
        return give(self.config, output, return_dict)

    def _kept(self, hidden: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dim() == 2:
            return mask[:, -hidden.shape[1] :]
        can_find_end = input_ids is not None and self.config.pad_token_id is not None
        inputs.check_pooling(hidden.shape[0], can_find_end)
        return input_ids != self.config.pad_token_id if can_find_end else hidden.new_ones(hidden.shape[:2])  # type: ignore[return-value]


class GPT2ForTokenClassification(GPT2PreTrainedModel):
    """GPT-2 with a classifier of each token."""

    head = "token_classification"
    accepts_loss_kwargs = True

    def __init__(
        self, config: GPT2Config, *, dtype: Dtype = None, param_dtype: Dtype = None, attn_implementation: str = "sdpa"
    ) -> None:
        super().__init__(config, dtype)
        config = self.config
        with self.building(param_dtype):
            self.transformer = GPT2Model(config, dtype=dtype, attn_implementation=attn_implementation)
            self.dropout = nn.Dropout(config.classifier_dropout)
            self.classifier = nn.Linear(config.n_embd, config.num_labels)

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Items = None,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Logits (B, T, L); labels: (B, T), of which -100 and masked ones do not count."""
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            None, None, use_cache, output_attentions, output_hidden_states, True,
        )  # fmt: skip
        logits = recast(self.classifier, self.compute_dtype, self.dropout(outputs.last_hidden_state))
        logits = whole("classifier", logits, self.config.num_labels)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, labels, present(attention_mask, labels), num_items_in_batch)
        output = TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)
        return give(self.config, output, return_dict)


class GPT2ForQuestionAnswering(GPT2PreTrainedModel):
    """GPT-2 with a head that marks where an answer starts and ends."""

    head = "question_answering"

    def __init__(
        self, config: GPT2Config, *, dtype: Dtype = None, param_dtype: Dtype = None, attn_implementation: str = "sdpa"
    ) -> None:
        super().__init__(config, dtype)
        config = self.config
        with self.building(param_dtype):
            self.transformer = GPT2Model(config, dtype=dtype, attn_implementation=attn_implementation)
            self.qa_outputs = nn.Linear(config.n_embd, 2)

    @old_calls
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Logits (B, T) of the answer's first and last token; positions: (B,), of which those beyond T do not count.

        `past_key_values` is what the text follows, such as an adapter's prefix; transformers has none here. No cache is
        given back, and `use_cache` says as elsewhere whether a token sees those before positions that begin again.
        """
        use_cache = use_cache if position_ids is not None else False
        outputs = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds,
            None, None, use_cache, output_attentions, output_hidden_states, True,
        )  # fmt: skip
        logits = recast(self.qa_outputs, self.compute_dtype, outputs.last_hidden_state)
        start, end = logits.unbind(-1)  # (B, T) each
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        output = QuestionAnsweringModelOutput(loss, start, end, outputs.hidden_states, outputs.attentions)
        return give(self.config, output, return_dict)


def lm_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits over the vocabulary, by the head, which may be tied: (..., E) -> (..., V)"""
    if hasattr(model.lm_head, "_hf_hook"):
        lend_embedding(model)
    plain = model.compute_dtype is None
    logits = project(model.lm_head, hidden) if plain else recast(model.lm_head, model.compute_dtype, hidden)
    return whole("lm_head", logits, getattr(model.lm_head, "out_features", logits.shape[-1]))


def answer(
    model: Any, hidden: Tensor, labels: Tensor | None, mask: Tensor | None, items: Items, skip_logits: bool | None,
    return_dict: bool | None,
) -> tuple[Tensor | None, Any]:  # fmt: skip
    """The loss of labels, if there are any, and the logits, which may come later; see `GPT2LMHeadModel.forward`."""
    compute = getattr(model, "logits", partial(lm_logits, model))
    if labels is None:
        inputs.check_skipped(skip_logits)
        return None, compute(hidden)
    check_tied(model)
    as_dict = model.config.use_return_dict if return_dict is None else return_dict
    can_wait = as_dict and skip_logits is None and not torch.compiler.is_compiling()
    can_wait = can_wait and not hasattr(model, "unshard")  # FSDP frees the head's weight after the call
    if not ((skip_logits or can_wait) and is_chunked(model, hidden)):
        logits = compute(hidden)
        return trained(model, lm_loss(logits, labels, mask, items)), None if skip_logits else logits
    weight, dtype = local(model.lm_head.weight), head_dtype(model, hidden)
    loss = head_loss(hidden, weight, labels, mask, items, dtype)
    return trained(model, loss), None if skip_logits else later_logits(hidden, weight, dtype)


def is_chunked(model: Any, hidden: Tensor) -> bool:
    """Whether the loss computes logits by itself: many, of a head that nobody has hooked, replaced or adapted."""
    logits = GPT2LMHeadModel.logits
    if getattr(getattr(model, "logits", None), "__func__", logits) is not logits:
        return False
    if not is_own(model.lm_head) and not is_replicated(model.lm_head):
        return False
    weight = local(model.lm_head.weight)
    fits = model.lm_head.bias is None and weight.device == hidden.device
    is_seen = torch.compiler.is_compiling() or is_unchanged(hidden)
    return fits and is_seen and chunk_rows(hidden, weight) < hidden.shape[:-1].numel()


def head_dtype(model: Any, hidden: Tensor) -> torch.dtype:
    """What the head multiplies in: autocast's dtype, or what the model computes in."""
    device = hidden.device.type
    is_cast = hidden.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else model.compute_dtype or hidden.dtype


def kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states that get logits: (B, T, E) -> (B, n, E)"""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() == 1:
            return hidden[:, logits_to_keep]
        logits_to_keep = int(logits_to_keep)  # a number, of which an exporter has made a tensor
    inputs.check_kept(logits_to_keep)
    return hidden[:, -logits_to_keep:]


def present(mask: Tensor | None, labels: Tensor) -> Tensor | None:
    """The part of a (B, past + T) mask that labels (B, T) stand under; a mask of rank 4 says nothing about labels."""
    return mask[:, -labels.shape[1] :] if mask is not None and mask.dim() == 2 else None


def last_tokens(mask: Tensor) -> Tensor:
    """The index of the last unmasked token of each row: (..., T) -> (...)"""
    inputs.check_pooled(mask.shape[-1])
    return mask.shape[-1] - 1 - (mask.flip(-1) != 0).int().argmax(-1)


def at(hidden: Tensor, index: Tensor) -> Tensor:
    """The state at one place of each row: (..., T, E), (...) -> (..., E); exported, its sizes stay free."""
    return hidden.gather(-2, index.long()[..., None, None].expand(*index.shape, 1, hidden.shape[-1])).squeeze(-2)


def rows(x: Tensor | None) -> Tensor | None:
    """Choices as rows of a batch: (B, C, ...) -> (B * C, ...)"""
    return None if x is None else x.flatten(0, 1)
