"""What programs hold: a GenerationConfig that they assign, update and save; and objects of transformers instead."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import OPTIONS, GenerationConfig
from gpt2_multi.generation.request import Request
from gpt2_multi.generation.stopping import FOUND
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.tokenizer.files import AddedToken
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

# What `GenerationConfig().to_dict()` of transformers 4.57 holds; 5.x has None where nothing was said.
OF_4_57: dict[str, Any] = {
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False,
    "max_time": None, "stop_strings": None, "do_sample": False, "num_beams": 1, "use_cache": True,
    "cache_implementation": None, "cache_config": None, "return_legacy_cache": None, "prefill_chunk_size": None,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "bad_words_ids": None, "renormalize_logits": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "token_healing": False,
    "guidance_scale": None, "watermarking_config": None, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "output_logits": None, "return_dict_in_generate": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "encoder_no_repeat_ngram_size": 0,
    "decoder_start_token_id": None, "is_assistant": False, "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4,
    "prompt_lookup_num_tokens": None, "max_matching_ngram_size": None, "assistant_early_exit": None,
    "assistant_lookbehind": 10, "target_lookbehind": 10, "disable_compile": False, "low_memory": None,
    "penalty_alpha": None, "dola_layers": None, "diversity_penalty": 0.0, "num_beam_groups": 1, "constraints": None,
    "force_words_ids": None, "_from_model_config": False, "transformers_version": "4.57.6",
}  # fmt: skip


def other(**changes: Any) -> Any:
    """A configuration of another library."""
    return SimpleNamespace(to_dict=lambda: OF_4_57 | changes)


def options_of(config: GenerationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in OPTIONS}


def test_an_assigned_value_is_checked_like_an_argument() -> None:
    config = GenerationConfig()
    config.max_new_tokens, config.top_k, config.eos_token_id = 3, None, [5, 6]
    assert (config.max_new_tokens, config.top_k, config.eos_token_ids) == (3, 0, (5, 6))
    with pytest.raises(InputError, match=r"^temperature: expected a number from 1e-9 .*, found 0$"):
        config.temperature = 0
    with pytest.raises(AttributeError, match="no option 'max_new_token'; did you mean 'max_new_tokens'"):
        config.max_new_token = 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no option 'max_new_token'; did you mean 'max_new_tokens'"):
        config.max_new_token  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(TypeError, match="no option 'max_new_token'; did you mean 'max_new_tokens'"):
        GenerationConfig(max_new_token=3)  # type: ignore[call-arg]
    assert config == GenerationConfig(max_new_tokens=3, top_k=0, eos_token_id=[5, 6])


def test_what_cannot_be_used_together_may_be_assigned_one_after_the_other() -> None:
    config = GenerationConfig()
    config.output_scores = True
    with pytest.raises(InputError, match="return_dict_in_generate=True"):
        config.with_options({})
    config.return_dict_in_generate = True
    config.validate(strict=True)
    assert config.with_options({}).records == ("scores", "log_probs")


def test_other_options_of_transformers_are_taken_where_they_change_nothing() -> None:
    config = GenerationConfig(use_cache=True, num_beam_groups=1)  # type: ignore[call-arg]
    config.use_cache, config._from_model_config = False, True  # type: ignore[attr-defined]
    assert (config.use_cache, config.num_beam_groups, config.penalty_alpha) == (False, 1, None)  # type: ignore[attr-defined]
    assert config.extra == {"use_cache": False, "num_beam_groups": 1}
    for make in (lambda: GenerationConfig(num_beam_groups=2), lambda: setattr(config, "num_beam_groups", 2)):  # type: ignore[call-arg]
        with pytest.raises(InputError, match="num_beam_groups: is not an option here; leave it out, and use num_beams"):
            make()
    config.sequence_bias = {(3,): 1.0}  # type: ignore[attr-defined]
    config.suppress_tokens = [4]  # type: ignore[attr-defined]
    assert config.biases == [((3,), 1.0), ((4,), -math.inf)]


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal_and_checked(again: Any) -> None:
    config = GenerationConfig(top_k=7, use_cache=False)  # type: ignore[call-arg]
    assert again(config) == config
    with pytest.raises(InputError):
        again(config).top_k = -1


def test_update_returns_what_it_does_not_know() -> None:
    config = GenerationConfig()
    assert config.update(top_k=3, foo=1, use_cache=False) == {"foo": 1}
    assert (config.top_k, config.extra) == (3, {"use_cache": False})
    with pytest.raises(InputError, match="top_p: expected"):
        config.update(top_p=2)


def test_dictionaries_and_files_hold_all_of_it(tmp_path: Path) -> None:
    config = GenerationConfig(top_k=3, logit_bias={2: -math.inf, (3, 4): 1.5}, eos_token_id=[5], extra={"x": 1})
    assert json.loads(json.dumps(config.to_dict()))["logit_bias"] == [[[3, 4], 1.5]]
    assert config.to_dict().keys() == OPTIONS.keys() | {"x"}
    assert config.to_diff_dict() == {
        "top_k": 3, "logit_bias": [[[3, 4], 1.5]], "bad_words_ids": [[2]], "eos_token_id": [5], "x": 1,
    }  # fmt: skip
    assert json.loads(config.to_json_string(use_diff=False)) == json.loads(json.dumps(config.to_dict()))
    config.save_pretrained(save_directory=tmp_path / "model")
    config.save_pretrained(tmp_path / "model", config_file_name="other.json")
    for again in (
        GenerationConfig.from_dict(config.to_dict()),
        GenerationConfig.from_dict(json.loads(config.to_json_string())),
        GenerationConfig.from_pretrained(tmp_path / "model"),
        GenerationConfig.from_pretrained(tmp_path, "other.json", subfolder="model", local_files_only=True),
    ):
        assert (again.biases[::-1], again.top_k, again.eos_token_id, again.extra) == (config.biases, 3, [5], {"x": 1})
    with pytest.raises(CheckpointError, match=r"generation_config\.json: there is no such file"):
        GenerationConfig.from_pretrained(tmp_path)


def test_options_come_on_top_of_a_file(tmp_path: Path) -> None:
    GenerationConfig(top_k=3, do_sample=True).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(pretrained_model_name=tmp_path, top_k=4, temperature=0.5)
    assert (config.top_k, config.temperature, config.do_sample) == (4, 0.5, True)
    config, unused = GenerationConfig.from_pretrained(tmp_path, top_k=5, foo=1, return_unused_kwargs=True)  # type: ignore[misc]
    assert (config.top_k, unused) == (5, {"foo": 1})
    with pytest.raises(TypeError, match="no option 'top_kk'; did you mean 'top_k'"):
        GenerationConfig.from_pretrained(tmp_path, top_kk=4)


def test_one_of_another_library_means_the_same() -> None:
    own = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    assert options_of(own.resolve(other(), {})) == options_of(own)
    found = own.resolve(other(max_length=9, top_k=0, do_sample=True, eos_token_id=[4], use_cache=False), {"top_p": 0.5})
    assert (found.max_length, found.top_k, found.do_sample, found.top_p) == (9, 0, True, 0.5)
    assert (found.eos_token_ids, found.pad_token_id) == ((4,), 3)
    with pytest.raises(InputError, match="dola_layers: is not an option here; leave it out"):
        own.resolve(other(dola_layers="high"), {})
    with pytest.raises(InputError, match="generation_config: foo is not an option here; set it to None"):
        own.resolve(other(foo=3), {})
    with pytest.raises(
        InputError, match="generation_config: expected a GenerationConfig, found a SimpleNamespace of types"
    ):
        own.resolve(SimpleNamespace(), {})  # type: ignore[arg-type]


def test_the_installed_transformers_is_understood() -> None:
    transformers = pytest.importorskip("transformers")
    own = GenerationConfig(bos_token_id=1, eos_token_id=2)
    theirs = transformers.GenerationConfig(max_new_tokens=4, do_sample=True, top_k=5, num_return_sequences=2)
    expected = GenerationConfig(
        max_new_tokens=4, do_sample=True, top_k=5, num_return_sequences=2, bos_token_id=1, eos_token_id=2
    )
    assert options_of(own.resolve(theirs, {})) == options_of(expected)
    assert options_of(GenerationConfig.from_model_config(transformers.GPT2Config(eos_token_id=7))) == options_of(
        GenerationConfig.of(GPT2Config(eos_token_id=7))
    )


def test_an_old_config_json_that_speaks_of_generation_is_heard() -> None:
    """As in transformers, where the folder has no generation_config.json; a `max_length` of 20 is what nobody said."""
    of = {"model_type": "gpt2", "do_sample": True, "top_k": 4, "max_length": 20, "bad_words_ids": None, "foo": 1}
    config = GenerationConfig.of(GPT2Config.from_dict(of))
    assert (config.do_sample, config.top_k, config.max_length) == (True, 4, None)
    assert GenerationConfig.of(GPT2Config.from_dict({**of, "max_length": 30})).max_length == 30


def test_a_tokenizer_of_transformers_does_what_ours_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, model = GPT2Tokenizer.from_pretrained("demo"), GPT2Config.from_pretrained("demo")
    ours.add_tokens(["kingdom"])
    ours.save_pretrained(tmp_path)
    config = GenerationConfig(max_new_tokens=4, stop_strings=["ing"])
    for kind in ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"):
        theirs = getattr(transformers, kind).from_pretrained(tmp_path)
        found, expected = (Request.of(config, model, "The kings of Naples", None, t) for t in (theirs, ours))
        assert found.ids.tolist() == expected.ids.tolist()
        assert np.array_equal(found.options.stops, expected.options.stops) and (found.options.stops == FOUND).any()
        assert "".join(texts.decode(theirs, ours("the kingdom€").input_ids, config)) == "the kingdom€"


def test_what_is_no_tokenizer_is_named_with_its_library() -> None:
    model = GPT2Config.from_pretrained("demo")
    with pytest.raises(
        InputError, match=r"tokenizer: expected a GPT2Tokenizer, or .* found an AddedToken of gpt2_multi"
    ):
        Request.of(GenerationConfig(), model, "the king", None, AddedToken("a"))


def test_none_is_an_option_that_is_not_set():
    config = GenerationConfig(temperature=None, top_p=None, do_sample=None, repetition_penalty=None)
    assert config == GenerationConfig()
    config.num_beams = None
    assert config.num_beams == 1
    assert config.with_options({"min_length": None, "early_stopping": None}) == GenerationConfig()
