"""What the packages show: every public name comes from the top, and the three frameworks show the same."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

import gpt2_multi
from gpt2_multi import errors
from gpt2_multi.model import outputs

NAMES = {
    "AddedToken", "BaseModelOutputWithPastAndCrossAttentions", "BatchEncoding", "CausalLMOutputWithCrossAttentions",
    "CheckpointError", "ConfigError", "GPT2Config", "GPT2DoubleHeadsModelOutput", "GPT2Error", "GPT2Tokenizer",
    "GPT2TokenizerFast", "GenerateOutput", "GenerationConfig", "InputError", "LogitsProcessor",
    "LogitsProcessorList", "QuestionAnsweringModelOutput", "SequenceClassifierOutputWithPast", "StoppingCriteria",
    "StoppingCriteriaList", "TextGenerationPipeline", "TextIteratorStreamer", "TextScore", "TextStreamer",
    "TokenClassifierOutput", "TokenizerError", "__version__", "pipeline", "set_seed",
}  # fmt: skip
# Of each framework: what its classes begin with, and what it shows beside the classes that all three have.
FRAMEWORKS = {
    "pt": ("torch", "", {"load_tf_weights_in_gpt2", "parameter_groups", "train_step"}),
    "tf": ("tensorflow", "TF", {"TFGPT2Tokenizer", "AdamW", "CosineSchedule"}),
    "flax": (
        "flax", "Flax",
        {
            "GPT2Module", "GPT2LMHeadModule", "GPT2DoubleHeadsModule", "GPT2ForSequenceClassificationModule",
            "GPT2ForTokenClassificationModule", "GPT2ForQuestionAnsweringModule", "TrainState", "cosine_rate",
            "create_train_state", "decay_mask", "eval_step", "optimizer", "train_step",
        },
    ),
}  # fmt: skip
CLASSES = [
    "GPT2PreTrainedModel", "GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
]  # fmt: skip


def test_the_face_is_the_list() -> None:
    assert set(gpt2_multi.__all__) == NAMES and len(gpt2_multi.__all__) == len(NAMES)
    assert set(dir(gpt2_multi)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_is_what_it_says(name: str) -> None:
    assert getattr(getattr(gpt2_multi, name), "__name__", name) == name


def test_every_error_and_every_output_has_a_face() -> None:
    found = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    found |= {name for name, value in vars(outputs).items() if dataclasses.is_dataclass(value)}
    assert found <= NAMES


def test_a_star_brings_the_names() -> None:
    there: dict[str, object] = {}
    exec("from gpt2_multi import *", there)
    assert there.keys() >= NAMES


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_the_frameworks_show_the_same_in_one_order(package: str) -> None:
    framework, prefix, more = FRAMEWORKS[package]
    pytest.importorskip(framework)
    shown = importlib.import_module(f"gpt2_multi.{package}").__all__
    common = [*(prefix + name for name in CLASSES), "KVCache", "cosine_schedule"]
    assert [name for name in shown if name in common] == common
    assert set(shown) == {*common, *more} and len(shown) == len(set(shown))
