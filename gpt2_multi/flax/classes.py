"""The classes around the linen modules, under the names of transformers: what holds parameters, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpt2_multi.flax.generation import generate as generation
from gpt2_multi.flax.generation.decoders import Decoders
from gpt2_multi.flax.heads import (
    GPT2DoubleHeadsModule,
    GPT2ForQuestionAnsweringModule,
    GPT2ForSequenceClassificationModule,
    GPT2ForTokenClassificationModule,
    GPT2LMHeadModule,
    rows,
)
from gpt2_multi.flax.layers import check_classes, facts, interceptors
from gpt2_multi.flax.loading import FlaxGPT2PreTrainedModel
from gpt2_multi.flax.model import GPT2Module
from gpt2_multi.generation.callbacks import Callbacks
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model import inputs
from gpt2_multi.model.config import GPT2Config

CALL = FlaxGPT2PreTrainedModel.__call__


class FlaxGPT2Model(FlaxGPT2PreTrainedModel):
    """The bare GPT-2, without a head."""

    head = "base"
    module_class = GPT2Module


class Generating(FlaxGPT2PreTrainedModel):
    """What the two classes share that have logits of the next token: generation, and what is compiled for it."""

    generation_config: GenerationConfig
    _decoders: tuple[Any, Decoders] | None = None

    def __init__(self, config: GPT2Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.generation_config = GenerationConfig.of(self.config)

    generate = generation.generate
    stream = generation.stream
    stream_tokens = generation.stream_tokens
    score = generation.score

    @property
    def decoders(self) -> Decoders:
        """The compiled functions that generate, of the model as it is now."""
        settings, found = self.settings(), self._decoders
        if found is None or found[0] != settings:
            found = self._decoders = (settings, Decoders.of(self))
        return found[1]

    @property
    def is_plain(self) -> bool:
        """Whether only our code and the parameters decide what a call gives."""
        return type(self.module) in (GPT2LMHeadModule, GPT2DoubleHeadsModule) and not self._is_steered()

    def renew(self, callbacks: Callbacks, assistant: Any) -> None:
        """Forget what was compiled of code that is not ours, which may depend on more than its arguments.

        Of a caller's functions, which are part of what is compiled, it forgets those of many calls.
        """
        if any(model is not None and model._is_steered() for model in (self, assistant)):
            self._decoders = None
        elif not self.decoders.has_room(callbacks):
            self._decoders = None

    def _is_steered(self) -> bool:
        return type(self).__call__ is not CALL or bool(interceptors())


class FlaxGPT2LMHeadModel(Generating):
    """GPT-2 with the language-model head: `FlaxGPT2LMHeadModel.from_pretrained("gpt2")`."""

    head = "lm"
    module_class = GPT2LMHeadModule

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Look at what a call was given."""
        super().check(arrays)
        check_classes(arrays.get("labels"), self.config.vocab_size)


class FlaxGPT2DoubleHeadsModel(Generating):
    """GPT-2 with the language-model head and a multiple-choice head."""

    head = "double_heads"
    module_class = GPT2DoubleHeadsModule

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Look at what a call was given: choices, which are rows of the body's batch."""
        ids, embeds = arrays.get("input_ids"), arrays.get("inputs_embeds")
        inputs.check_given(ids, embeds)
        source: Any = embeds if ids is None else ids
        inputs.check_choices(source.shape, 4 if ids is None else 3)
        whole = ("past_key_values", "head_mask")
        super().check({name: x if name in whole else rows(x) for name, x in arrays.items()})
        check_classes(arrays.get("labels"), self.config.vocab_size)
        check_classes(arrays.get("mc_labels"), source.shape[1])
        if (index := arrays.get("mc_token_ids")) is not None:
            inputs.check_choice_tokens(facts(index), source.shape[:3])


class FlaxGPT2ForSequenceClassification(FlaxGPT2PreTrainedModel):
    """GPT-2 with a classifier of the whole text, at its last token."""

    head = "sequence_classification"
    module_class = GPT2ForSequenceClassificationModule

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Look at what a call was given; labels are classes unless the problem is another."""
        super().check(arrays)
        if self.config.num_labels > 1 and self.config.problem_type in (None, "single_label_classification"):
            check_classes(arrays.get("labels"), self.config.num_labels)


class FlaxGPT2ForTokenClassification(FlaxGPT2PreTrainedModel):
    """GPT-2 with a classifier of each token."""

    head = "token_classification"
    module_class = GPT2ForTokenClassificationModule

    def check(self, arrays: Mapping[str, Any]) -> None:
        """Look at what a call was given."""
        super().check(arrays)
        check_classes(arrays.get("labels"), self.config.num_labels)


class FlaxGPT2ForQuestionAnswering(FlaxGPT2PreTrainedModel):
    """GPT-2 with a head that marks where an answer starts and ends."""

    head = "question_answering"
    module_class = GPT2ForQuestionAnsweringModule
