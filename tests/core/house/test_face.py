"""What the packages show: every public name comes from the top, and the three frameworks show the same."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

import gpt2_multi
from gpt2_multi import errors
from gpt2_multi.model import outputs

NAMES = {
    "AddedToken", "AutoConfig", "AutoTokenizer", "BaseModelOutputWithPastAndCrossAttentions", "BatchEncoding",
    "BitsAndBytesConfig", "CausalLMOutputWithCrossAttentions", "CheckpointError", "ConfigError", "GPT2Config",
    "GPT2DoubleHeadsModelOutput", "GPT2Error", "GPT2Tokenizer", "GPT2TokenizerFast",
    "GPT2_PRETRAINED_CONFIG_ARCHIVE_MAP", "GPT2_PRETRAINED_MODEL_ARCHIVE_LIST", "GPT2_PRETRAINED_MODEL_ARCHIVE_MAP",
    "GenerateOutput", "GenerationConfig", "InputError", "LogitsProcessor", "LogitsProcessorList", "LostError",
    "QuestionAnsweringModelOutput", "SequenceClassifierOutputWithPast", "StoppingCriteria", "StoppingCriteriaList",
    "TF_GPT2_PRETRAINED_MODEL_ARCHIVE_LIST", "TF_GPT2_PRETRAINED_MODEL_ARCHIVE_MAP", "TextGenerationPipeline",
    "TextIteratorStreamer", "TextScore", "TextStreamer", "TokenClassifierOutput", "TokenizerError", "__version__",
    "pipeline", "set_seed",
}  # fmt: skip
OTHER = {  # names of transformers that stand for one of ours
    "AutoConfig": "GPT2Config", "AutoModel": "GPT2Model", "AutoModelForCausalLM": "GPT2LMHeadModel",
    "AutoModelForPreTraining": "GPT2LMHeadModel", "AutoModelWithLMHead": "GPT2LMHeadModel",
    "AutoModelForSequenceClassification": "GPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "GPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "GPT2ForQuestionAnswering", "GPT2MainLayer": "GPT2Model",
    "SequenceClassifierOutput": "SequenceClassifierOutputWithPast",
}  # fmt: skip
OUTPUTS = [
    "BaseModelOutputWithPastAndCrossAttentions", "CausalLMOutputWithCrossAttentions", "GPT2DoubleHeadsModelOutput",
    "TokenClassifierOutput", "QuestionAnsweringModelOutput",
]  # fmt: skip
# Of each framework: what its classes begin with, and what it shows beside the classes that all three have.
FRAMEWORKS = {
    "pt": ("torch", "", {"AutoModelWithLMHead", "load_tf_weights_in_gpt2", "parameter_groups", "train_step"}),
    "tf": (
        "tensorflow", "TF",
        {
            "TFAutoModelWithLMHead", "TFGPT2MainLayer", "TFGPT2Tokenizer", "AdamW", "CosineSchedule", "Perplexity",
            "TFSequenceClassifierOutputWithPast", *(f"TF{name}" for name in OUTPUTS),
        },
    ),
    "flax": (
        "flax", "Flax",
        {
            "GPT2Module", "GPT2LMHeadModule", "GPT2DoubleHeadsModule", "GPT2ForSequenceClassificationModule",
            "GPT2ForTokenClassificationModule", "GPT2ForQuestionAnsweringModule", "TrainState", "cosine_rate",
            "create_train_state", "decay_mask", "eval_step", "optimizer", "train_step",
            "FlaxSequenceClassifierOutput", *(f"Flax{name}" for name in OUTPUTS),
        },
    ),
}  # fmt: skip
CLASSES = [
    "GPT2PreTrainedModel", "GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering", "AutoModel", "AutoModelForCausalLM",
    "AutoModelForPreTraining", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
]  # fmt: skip


def test_the_face_is_the_list() -> None:
    assert set(gpt2_multi.__all__) == NAMES and len(gpt2_multi.__all__) == len(NAMES)
    assert set(dir(gpt2_multi)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_is_what_it_says(name: str) -> None:
    assert getattr(getattr(gpt2_multi, name), "__name__", name) == OTHER.get(name, name)


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


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_what_transformers_has_at_its_top_is_at_ours(package: str) -> None:
    framework, prefix, more = FRAMEWORKS[package]
    pytest.importorskip(framework)
    shown = importlib.import_module(f"gpt2_multi.{package}")
    others = {name for name in more if name.startswith(prefix or "Auto") or name == "load_tf_weights_in_gpt2"}
    assert set(gpt2_multi._ROOMS[package]) == {*(prefix + name for name in CLASSES), *others}
    for name in gpt2_multi._ROOMS[package]:
        short = name.removeprefix(prefix)
        known = {short, OTHER.get(short, short), prefix + OTHER.get(short, short)}
        assert getattr(gpt2_multi, name) is getattr(shown, name) and getattr(shown, name).__name__ in {name, *known}


def test_type_checkers_read_the_same_names() -> None:
    tree = ast.parse(Path(gpt2_multi.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = [(node.module, alias.name, alias.asname) for node in block.body for alias in node.names]
    rooms = gpt2_multi._ROOMS.items()
    assert sorted(found) == sorted((f"gpt2_multi.{room}", name, name) for room, names in rooms for name in names)
