"""The configuration: defaults, spellings, checks, and files of every age, of which no key may be lost."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_multi.errors import CheckpointError, ConfigError
from gpt2_multi.files.hub import ARCHIVE
from gpt2_multi.model.config import ALIASES, GPT2Config
from gpt2_multi.model.fields import FIELDS
from gpt2_multi.model.weights import parameter_count, table
from tests.support.fixtures import MODELS, folder

# What GPT2Config and PretrainedConfig of transformers 4.57 document.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "summary_type": "cls_index", "summary_use_proj": True,
    "summary_activation": None, "summary_proj_to_labels": True, "summary_first_dropout": 0.1,
    "scale_attn_weights": True, "use_cache": True, "bos_token_id": 50256, "eos_token_id": 50256,
    "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "pad_token_id": None, "add_cross_attention": False, "is_decoder": False, "tie_word_embeddings": True,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "problem_type": None,
    "output_hidden_states": False, "output_attentions": False, "return_dict": True, "torchscript": False,
    "pruned_heads": {}, "architectures": None, "dtype": None,
}  # fmt: skip

# config.json of `gpt2` in the forms that it has had.
OF_2019 = {
    "attn_pdrop": 0.1, "embd_pdrop": 0.1, "finetuning_task": None, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "num_labels": 1, "output_attentions": False, "output_hidden_states": False, "output_past": True,
    "predict_special_tokens": True, "pruned_heads": {}, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "torchscript": False, "use_bfloat16": False, "vocab_size": 50257,
}  # fmt: skip
OF_2021 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
OF_2023 = {
    **OF_2021, "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "n_inner": None,
    "reorder_and_upcast_attn": False, "torch_dtype": "float32", "transformers_version": "4.30.0",
    "_name_or_path": "gpt2",
}  # fmt: skip
DOUBLE_HEADS_OF_2020 = {**OF_2019, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0}}
STRETCHED = {**OF_2021, "n_positions": 2048}  # n_ctx was left behind

SMALL = {"n_embd": 8, "n_head": 2, "n_layer": 2}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FOREIGN = st.text().filter(lambda key: key not in DEFAULTS | ALIASES and key not in ("num_labels", "model_type"))


@pytest.mark.parametrize("name", DEFAULTS)
def test_default(name: str) -> None:
    assert getattr(GPT2Config(), name) == DEFAULTS[name]


def test_every_field_has_a_default_to_compare_with() -> None:
    assert DEFAULTS.keys() == FIELDS.keys() - {"extra", "from_file", "name_or_path"}


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases_read_and_write_the_field(alias: str, name: str) -> None:
    value = "float16" if name == "dtype" else 24
    config = GPT2Config(**{alias: value})
    assert getattr(config, name) == getattr(config, alias) == value
    config = GPT2Config()
    setattr(config, alias, value)
    assert getattr(config, name) == value
    setattr(config, name, getattr(GPT2Config(), name))
    assert getattr(config, alias) == DEFAULTS[name]


def test_two_spellings_of_one_setting_must_agree() -> None:
    assert GPT2Config(n_layer=3, num_hidden_layers=3).n_layer == 3
    with pytest.raises(ConfigError, match="num_hidden_layers is 4 but n_layer is 3"):
        GPT2Config(n_layer=3, num_hidden_layers=4)


def test_assignment_is_checked() -> None:
    config = GPT2Config()
    config.pad_token_id = 50256
    assert config.pad_token_id == 50256
    with pytest.raises(ConfigError, match="n_embd must be a multiple of n_head; found n_embd 768 and n_head 7"):
        config.n_head = 7
    with pytest.raises(AttributeError, match="no setting 'n_heads'; did you mean 'n_head'"):
        config.n_heads = 7  # type: ignore[attr-defined]
    assert config == GPT2Config(pad_token_id=50256)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_layer", 0), ("n_layer", True), ("n_layer", "12"), ("n_layer", 1.0), ("n_inner", 0), ("vocab_size", None),
        ("attn_pdrop", 1.0), ("attn_pdrop", -0.1), ("resid_pdrop", float("nan")), ("layer_norm_epsilon", 0),
        ("initializer_range", -1), ("initializer_range", float("inf")), ("activation_function", "mish"),
        ("summary_type", "attn"), ("use_cache", 1), ("bos_token_id", "a"), ("problem_type", "x"),
        ("eos_token_id", [1, None]), ("id2label", {}), ("id2label", {"a": "b"}), ("id2label", {0: 1}),
        ("dtype", "int8"), ("name_or_path", 3),
        ("label2id", {"a": "0"}), ("pruned_heads", {0: [12]}), ("pruned_heads", {12: [0]}), ("pruned_heads", {0: 1}),
        ("pruned_heads", {0: list(range(12))}), ("architectures", "GPT2Model"), ("extra", {"n_layer": 3}),
        ("extra", {1: 2}), ("extra", {"n_ctx": 3}), ("num_labels", 0), ("num_labels", None), ("n_embd", 50),
        ("n_positions", 0), ("n_head", -1), ("embd_pdrop", True), ("summary_first_dropout", "0.1"),
        ("summary_activation", "tanhh"), ("pad_token_id", [1]),
        *((name, 1) for name in DEFAULTS if isinstance(DEFAULTS[name], bool)),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_when_made_and_when_assigned(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        GPT2Config(**{name: value})
    config = GPT2Config()
    with pytest.raises(ConfigError, match=name):
        setattr(config, name, value)
    assert config == GPT2Config()


def test_every_field_is_tried_with_a_wrong_value() -> None:
    (marks,) = test_wrong_values_are_refused_when_made_and_when_assigned.pytestmark  # type: ignore[attr-defined]
    assert FIELDS.keys() - {"from_file"} <= {name for name, _ in marks.args[1]}


def test_what_is_given_is_not_shared() -> None:
    heads, extra = {0: [1]}, {"a": {"b": 1}}
    config = GPT2Config(pruned_heads=heads, extra=extra)
    heads[0].append(2)
    extra["a"]["b"] = 2
    assert (config.pruned_heads, config.extra) == ({0: [1]}, {"a": {"b": 1}})


def test_an_unknown_argument_is_a_type_error_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match=r"no setting 'n_layers'; did you mean 'n_layer'\?$"):
        GPT2Config(n_layers=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"no setting 'xyzzy'$"):
        GPT2Config(xyzzy=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no setting 'n_layers'"):
        GPT2Config().replace(n_layers=3)


def test_numbers_of_other_libraries_are_taken() -> None:
    config = GPT2Config(n_layer=np.int64(3), attn_pdrop=np.float32(0.5))  # type: ignore[arg-type]
    assert json.loads(config.to_json_string())["n_layer"] == 3
    assert json.loads(config.to_json_string())["attn_pdrop"] == 0.5


def test_num_labels_numbers_the_labels() -> None:
    config = GPT2Config(num_labels=3)  # type: ignore[call-arg]
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.num_labels = 1
    assert (config.num_labels, config.label2id) == (1, {"LABEL_0": 0})
    config.id2label = {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}
    with pytest.raises(ConfigError, match="num_labels is 3 but id2label has 2 labels"):
        GPT2Config(num_labels=3, id2label={0: "no", 1: "yes"})  # type: ignore[call-arg]


def test_replace_changes_what_depends_on_each_other_at_once() -> None:
    config = GPT2Config(pad_token_id=3, id2label={0: "a"})
    bigger = config.replace(n_embd=70, n_head=7, num_labels=3)
    assert (bigger.n_embd, bigger.n_head, bigger.num_labels, bigger.label2id["LABEL_2"]) == (70, 7, 3, 2)
    assert (config.n_embd, config.num_labels, bigger.pad_token_id) == (768, 1, 3)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_equal_and_checked(again: Any) -> None:
    config = GPT2Config.from_dict(OF_2023)
    other = again(config)
    assert other == config
    assert other.to_json_string() == config.to_json_string()
    with pytest.raises(ConfigError):
        other.n_head = 7
    other.n_layer = 3
    assert config.n_layer == 12


@pytest.mark.parametrize("keys", [OF_2019, OF_2021, OF_2023, DOUBLE_HEADS_OF_2020, STRETCHED])
def test_old_files_lose_no_key(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = GPT2Config.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    settled = {"n_ctx": config.n_positions, "num_labels": config.num_labels}
    assert {key: written[key] for key in keys} == {key: settled.get(key, value) for key, value in keys.items()}
    assert GPT2Config.from_pretrained(tmp_path) == config


def test_contradictions_of_old_files_are_settled_as_transformers_does() -> None:
    assert GPT2Config.from_dict(STRETCHED).n_positions == 2048
    assert GPT2Config.from_dict(DOUBLE_HEADS_OF_2020).num_labels == 2
    assert GPT2Config.from_dict({"model_type": "gpt2", "id2label": None, "label2id": None}) == GPT2Config()


@given(st.dictionaries(FOREIGN, JSON, max_size=5), st.sampled_from([OF_2019, OF_2021, OF_2023, SMALL, {}]))
def test_keys_that_are_not_gpt2_s_survive(foreign: dict[str, Any], known: dict[str, Any]) -> None:
    foreign = {key: value for key, value in foreign.items() if key not in known}
    keys = {"model_type": "gpt2", **foreign, **known}
    config = GPT2Config.from_dict(keys)
    written = json.loads(config.to_json_string())
    assert {key: written[key] for key in foreign} == foreign
    assert {key: written[key] for key in keys.keys() - {"id2label"}} == {
        key: value for key, value in keys.items() if key != "id2label"
    }
    assert GPT2Config.from_dict(written) == config
    assert config.to_dict()["model_type"] == "gpt2"


def test_keys_named_like_this_library_s_own_bookkeeping_survive() -> None:
    keys = {
        "n_layer": 2,
        "extra": 1,
        "from_file": [2],
        "use_return_dict": True,
        "name_or_path": "a",
        "_name_or_path": "b",
    }
    written = json.loads(GPT2Config.from_dict(keys).to_json_string())
    assert {key: written[key] for key in keys} == keys


# What `GPT2Config(num_labels=3, pad_token_id=5, n_layer=3).to_dict()` of transformers 4.57 holds beside OF_2021's keys.
OF_4_57 = {
    **{key: value for key, value in OF_2021.items() if key not in ("n_ctx", "task_specific_params")}, "n_layer": 3,
    "n_inner": None, "scale_attn_weights": True, "use_cache": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "return_dict": True, "output_hidden_states": False, "torchscript": False,
    "dtype": None, "pruned_heads": {}, "tie_word_embeddings": True, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None,
    "add_cross_attention": False, "tie_encoder_decoder": False, "finetuning_task": None, "pad_token_id": 5,
    "id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "task_specific_params": None, "problem_type": None, "tokenizer_class": None, "prefix": None, "sep_token_id": None,
    "decoder_start_token_id": None, "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False,
    "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
    "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "_name_or_path": "", "transformers_version": "4.57.6", "tf_legacy_loss": False, "use_bfloat16": False,
    "output_attentions": False,
}  # fmt: skip


@pytest.mark.parametrize("keys", [OF_2019, OF_2021, OF_2023, DOUBLE_HEADS_OF_2020, OF_4_57, {"a_b": [1], "n_layer": 2}])
def test_the_constructor_takes_what_to_dict_gives(keys: dict[str, Any]) -> None:
    config = GPT2Config.from_dict({"model_type": "gpt2", **keys})
    assert GPT2Config(**config.to_dict()) == config
    assert GPT2Config(**json.loads(json.dumps(config.to_dict()))) == config
    assert GPT2Config(**{"model_type": "gpt2", **keys}) == config
    with pytest.raises(TypeError, match="no setting 'n_layers'; did you mean 'n_layer'"):
        GPT2Config(**config.to_dict(), n_layers=3)


def test_the_installed_transformers_s_to_dict_is_taken() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config(n_layer=3, num_labels=3, pad_token_id=5, reorder_and_upcast_attn=True)
    for config in (GPT2Config(**theirs.to_dict()), GPT2Config.from_dict(theirs.to_dict())):
        assert (config.n_layer, config.num_labels, config.pad_token_id) == (3, 3, 5)
        assert config.reorder_and_upcast_attn and config.label2id["LABEL_2"] == 2


def test_what_other_libraries_keep_on_a_configuration() -> None:
    config = GPT2Config(sep_token_id=7, is_encoder_decoder=False)  # type: ignore[call-arg]
    config._name_or_path, config.label_smoothing, config.use_cache = "gpt2", 0.1, False  # type: ignore[attr-defined]
    assert (config._name_or_path, config.label_smoothing, config.sep_token_id) == ("gpt2", 0.1, 7)  # type: ignore[attr-defined]
    assert getattr(config, "quantization_config", None) is None and not hasattr(config, "n_layers")
    written = json.loads(config.to_json_string())
    assert (written["label_smoothing"], written["sep_token_id"]) == (0.1, 7) and "_name_or_path" not in written
    assert config.replace(n_layer=3).label_smoothing == copy.deepcopy(config).label_smoothing == 0.1  # type: ignore[attr-defined]
    for name in ("n_layers", "vocabsize", "layer_norm_eps", "attn_drop", "resid_dropp"):
        with pytest.raises(AttributeError, match=f"no setting '{name}'; did you mean"):
            setattr(config, name, 3)


def test_a_configuration_that_is_made_of_this_one() -> None:
    class Mine(GPT2Config):
        def __init__(self, width: int = 3, **options: Any) -> None:
            self.width = width
            super().__init__(**options)

    config = Mine(width=4, n_layer=2)
    assert (config.width, config.n_layer, config.to_dict()["width"]) == (4, 2, 4)


def test_the_methods_that_programs_call(tmp_path: Path) -> None:
    GPT2Config(n_layer=3).save_pretrained(save_directory=tmp_path / "outer" / "inner")
    config, unused = GPT2Config.from_pretrained(
        pretrained_model_name_or_path=tmp_path / "outer", subfolder="inner", return_unused_kwargs=True, n_head=6, foo=1,
        trust_remote_code=True, token=None, local_files_only=True,
    )  # type: ignore[misc]  # fmt: skip
    assert (config.n_layer, config.n_head, unused) == (3, 6, {"foo": 1})
    keys, others = GPT2Config.get_config_dict(tmp_path / "outer" / "inner", n_head=6)
    assert (keys["n_layer"], others) == (3, {"n_head": 6})
    config.update({"n_layer": 4, "note": "a", "n_embd": 70, "n_head": 7})
    assert (config.n_embd, config.n_head, config.name_or_path) == (70, 7, str(tmp_path / "outer"))
    config.update_from_string("n_embd=12,n_head=6,resid_pdrop=0.5,scale_attn_weights=False,activation_function=relu")
    assert (config.n_embd, config.resid_pdrop, config.scale_attn_weights) == (12, 0.5, False)
    assert config.activation_function == "relu"
    with pytest.raises(ConfigError, match="no setting 'n_embed'; did you mean 'n_embd'"):
        config.update_from_string("n_embed=3")
    config.n_embd = 768
    assert config.to_diff_dict().items() >= {"model_type": "gpt2", "n_layer": 4, "n_head": 6, "note": "a"}.items()
    assert "n_embd" not in config.to_diff_dict() and "pad_token_id" not in json.loads(config.to_json_string())
    assert json.loads(config.to_json_string(use_diff=False))["pad_token_id"] is None
    with pytest.raises(TypeError, match="no setting 'foo'"):
        GPT2Config.from_pretrained(tmp_path / "outer" / "inner", foo=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_transformers_is_written_back_byte_for_byte(name: str) -> None:
    path = folder(name) / "config.json"
    assert GPT2Config.from_json_file(path).to_json_string().encode() == path.read_bytes()


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"n_layer": 2}')
    assert GPT2Config.from_pretrained(tmp_path).n_layer == 2


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    GPT2Config().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OF_2019))
    config = GPT2Config.from_pretrained(tmp_path, n_positions=512, num_labels=4)
    assert (config.n_ctx, config.num_labels) == (512, 4)
    keys = config.to_dict()
    assert (keys["n_ctx"], keys["n_positions"], keys["num_labels"]) == (512, 512, 4)


def test_to_dict_is_a_copy() -> None:
    config = GPT2Config.from_dict({**OF_2021})
    config.to_dict()["task_specific_params"]["text-generation"].clear()
    assert config.to_dict()["task_specific_params"] == OF_2021["task_specific_params"]
    assert GPT2Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"model_type": "bert"}', "model_type must be 'gpt2'; found 'bert'"),
        ('{"hidden": 3}', "none of these keys is one of a GPT-2 configuration: hidden"),
        ('{"n_layer": 0}', "n_layer must be at least 1; found 0"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_a_folder_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        GPT2Config.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2Config(n_layer=3).save_pretrained(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        GPT2Config(n_layer=4).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert GPT2Config.from_pretrained(tmp_path).n_layer == 3


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)  # fmt: skip
def test_published_sizes(name: str, parameters: int) -> None:
    config = GPT2Config.from_archive(name)
    assert parameter_count(config) == parameters
    assert GPT2Config.from_archive(ARCHIVE[name].hub_id) == config


def test_gpt2_has_148_tensors() -> None:
    assert len(table(GPT2Config.from_archive("gpt2"))) == 148
    with pytest.raises(ConfigError, match="'gpt3' is not a published GPT-2"):
        GPT2Config.from_archive("gpt3")


UNUSUAL = GPT2Config(
    vocab_size=99, n_positions=33, n_embd=24, n_layer=3, n_head=4, n_inner=20, activation_function="relu",
    resid_pdrop=0.0, attn_pdrop=0.25, layer_norm_epsilon=1e-6, summary_type="mean", summary_activation="tanh",
    scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, use_cache=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=3, add_cross_attention=True, tie_word_embeddings=False,
    id2label={0: "a", 1: "b", 2: "c"}, problem_type="regression", dtype="float16", architectures=["GPT2Model"],
)  # fmt: skip


def shared_fields() -> list[str]:
    # transformers 5 dropped pruned_heads and torchscript, and keeps is_decoder as a mere key
    return sorted(DEFAULTS.keys() - {"pruned_heads", "torchscript", "is_decoder", "dtype"})


@pytest.mark.parametrize("config", [GPT2Config(), UNUSUAL], ids=["default", "unusual"])
def test_transformers_reads_what_is_written_here(config: GPT2Config, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config.save_pretrained(tmp_path)
    theirs = transformers.GPT2Config.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in shared_fields()} == {
        name: getattr(config, name) for name in shared_fields()
    }
    assert str(theirs.dtype).removeprefix("torch.") == str(config.dtype)


@pytest.mark.parametrize("config", [GPT2Config(), UNUSUAL], ids=["default", "unusual"])
def test_what_transformers_writes_is_read_here(config: GPT2Config, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    transformers.GPT2Config(**keys).save_pretrained(tmp_path)
    assert GPT2Config.from_pretrained(tmp_path).replace(extra={}) == config
