"""`GPT2Config`: every setting of a GPT-2, checked when made and when changed; its fields are config.json's keys.

What a file holds beyond the fields is kept in `extra` and written back: reading and writing a config.json loses no key.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from gpt2_multi.errors import ConfigError, InputError, described, nearest, shortened
from gpt2_multi.files import arguments
from gpt2_multi.files.hub import ARCHIVE, push, resolve
from gpt2_multi.files.json_files import read_json, write_whole
from gpt2_multi.model.fields import ACTIVATIONS, COUNT, ELSEWHERE, FIELDS, check_together, wrong

ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "n_ctx": "n_positions",
    "torch_dtype": "dtype",
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = FIELDS.keys() | ALIASES.keys() | {"num_labels"}  # what the constructor takes
MOST_LABELS = 1 << 16  # that are numbered without being named: a file with a few digits would make a dict of them
_KEYS = _NAMES - {"extra", "from_file", "name_or_path"}  # what a file may set
SETTINGS = _KEYS | ELSEWHERE  # what a caller may set by name
INT8 = {"quant_method": "gpt2-multi", "bits": 8}  # what config.json says of weights in int8, as quantization_config
ALIKE = 0.8  # from which on a name is a known one that is spelled wrongly


def check_config(config: object) -> GPT2Config:
    """The configuration of a model: ours, or one of transformers, of which ours is made."""
    if isinstance(config, GPT2Config):
        return config
    if hasattr(config, "model_type") and hasattr(config, "to_dict"):
        return GPT2Config.from_dict(config.to_dict())
    raise InputError(
        f"config: expected a GPT2Config, found {described(config)}; GPT2Config.from_dict makes one of a dict"
    )


def as_config(config: Any) -> GPT2Config:
    """What `from_pretrained` is given in place of the files' configuration: one, its keys, or where it lies."""
    if isinstance(config, Mapping):
        return GPT2Config.from_dict(config)
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return GPT2Config.from_json_file(path) if path.is_file() else GPT2Config.from_pretrained(config)
    return check_config(config)


def _label_count(number: Any) -> int:
    """How many labels to number."""
    found: int = COUNT("num_labels", number)
    if found > MOST_LABELS:
        raise wrong("num_labels", f"at most {MOST_LABELS} where id2label does not name them", number)
    return found


def _numbered_labels(number: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(number)}


def _unknown(name: str) -> str:
    return f"GPT2Config has no setting {name!r}{nearest(name, _KEYS)}"


def _is_misspelt(name: str) -> bool:
    return name not in ELSEWHERE and nearest(name, _KEYS, ALIKE) != ""


def _check_type(model_type: object) -> None:
    if model_type != "gpt2":
        raise ConfigError(f"model_type must be 'gpt2'; found {shortened(repr(model_type))}: that is another model")


def _as_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, or a file's keys, spelled as fields; two spellings of one setting must agree.

    With a `model_type` they are what `to_dict` gives of any configuration: keys that are not GPT-2's are kept.
    """
    is_whole = "model_type" in given
    _check_type(given.get("model_type", "gpt2"))
    foreign = {name: value for name, value in given.items() if name not in _NAMES and name != "model_type"}
    for name in foreign:
        if name not in ELSEWHERE and (not is_whole or _is_misspelt(name)):
            raise TypeError(_unknown(name))
    given = _resolved(dict(given)) if is_whole else given
    values = {name: value for name, value in given.items() if name in FIELDS}
    if foreign:
        values["extra"] = {**values.get("extra", {}), **foreign}
    for alias, name in ALIASES.items():
        if given.get(alias) is not None and values.setdefault(name, given[alias]) != given[alias]:
            raise ConfigError(
                f"{alias} is {given[alias]!r} but {name} is {values[name]!r}: one setting, give one value"
            )
    if "num_labels" in given:
        number = _label_count(given["num_labels"])
        labels = FIELDS["id2label"]("id2label", values.setdefault("id2label", _numbered_labels(number)))
        if len(labels) != number:
            raise ConfigError(f"num_labels is {number} but id2label has {len(labels)} labels: give one of the two")
    return values


def _check_all(values: Mapping[str, Any]) -> None:
    check_together(values)
    if taken := values["extra"].keys() & (_KEYS | {"model_type"}):
        raise ConfigError(f"extra is for keys that are not GPT-2's; {min(taken)!r} is a setting of its own")


def _resolved(known: dict[str, Any]) -> dict[str, Any]:
    """A file's keys, its contradictions decided as transformers does: files of 2019 and 2020 are full of them.

    Changing `n_positions` left `n_ctx` behind, and the double-heads model set `num_labels` to 1 beside two labels.
    """
    labels = ("id2label", "label2id", "num_labels")
    known = {key: value for key, value in known.items() if value is not None or key not in labels}
    outdated = {"n_ctx": "n_positions", "num_labels": "id2label"}
    return {key: value for key, value in known.items() if outdated.get(key) not in known}


_Class = TypeVar("_Class", bound=type)


def _takes_aliases(cls: _Class) -> _Class:
    """Let the constructor that `dataclass` wrote take the aliases too, and suggest a name for one that it lacks."""
    plain = cls.__init__  # type: ignore[misc]

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **given: Any) -> None:
        values = _as_fields(given)
        if before := vars(self).pop("extra", {}):  # that a class made of this one has set
            values["extra"] = {**before, **values.get("extra", {})}
        plain(self, *args, **values)

    cls.__init__ = init  # type: ignore[misc]
    return cls


def _alias(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


@_takes_aliases
@dataclass
class GPT2Config:
    """The settings of a GPT-2, under the names of config.json; the defaults are those of the smallest GPT-2.

    Every value is checked, at construction and at assignment (`config.pad_token_id = 0`); fields that depend on each
    other change together through `replace`. `hidden_size`, `num_attention_heads`, `num_hidden_layers`,
    `max_position_embeddings`, `n_ctx`, `torch_dtype` and `num_labels` are other spellings, read and written alike.

    Other attributes may be set too, as other libraries do: they are kept in `extra` and written to files, but for those
    that begin with "_". A name that is nearly that of a setting is an error.
    """

    model_type: ClassVar[str] = "gpt2"  # other libraries ask for it, and for the other spellings
    attribute_map: ClassVar[Mapping[str, str]] = ALIASES

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    scale_attn_weights: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    # Files hold the fields above always, those below where they are not the default (and any that the file had).
    pad_token_id: int | None = None
    add_cross_attention: bool = False
    is_decoder: bool = False  # GPT-2 is causal either way
    tie_word_embeddings: bool = True
    id2label: dict[int, str] = field(default_factory=lambda: _numbered_labels(2))
    label2id: dict[str, int] = field(default_factory=dict)  # empty: the inverse of id2label
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    torchscript: bool = False  # outputs are tuples, whatever return_dict says
    pruned_heads: dict[int, list[int]] = field(default_factory=dict)  # layer -> its heads that are cut away
    architectures: list[str] | None = None
    dtype: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # keys of a file that are not GPT-2's
    from_file: frozenset[str] = field(default=frozenset(), repr=False, compare=False)  # the keys that the file had
    name_or_path: str = field(default="", repr=False, compare=False)  # what it was loaded from

    hidden_size = _alias("n_embd")
    num_attention_heads = _alias("n_head")
    num_hidden_layers = _alias("n_layer")
    max_position_embeddings = _alias("n_positions")
    n_ctx = _alias("n_positions")
    torch_dtype = _alias("dtype")

    @property
    def num_labels(self) -> int:
        """The number of classes; setting it numbers the labels anew."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        self.id2label = _numbered_labels(_label_count(number))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FIELDS and hasattr(type(self), name):
            return super().__setattr__(name, value)  # a property, which sets its field
        if name not in FIELDS:
            return self._keep(name, value)
        values = {**vars(self), name: FIELDS[name](name, value)}
        if name == "id2label" or not values.get("label2id", True):
            values["label2id"] = {label: i for i, label in values["id2label"].items()}
        if len(values) == len(FIELDS):  # the constructor comes here once per field
            _check_all(values)
        vars(self).update(values)

    def _keep(self, name: str, value: Any) -> None:
        if _is_misspelt(name):
            raise AttributeError(_unknown(name))
        vars(self)["extra"] = {**vars(self).get("extra", {}), name: value}

    if not TYPE_CHECKING:  # to which a class with a __getattr__ has every attribute

        def __getattr__(self, name: str) -> Any:
            kept = vars(self).get("extra", {})
            if name not in kept or name.startswith("__"):  # a file says nothing about Python
                raise AttributeError(_unknown(name))
            return kept[name]

    @property
    def activation(self) -> str:
        """The function that `activation_function` names: relu, silu, gelu, tanh_gelu, quick_gelu or tanh."""
        return ACTIVATIONS[self.activation_function]

    @property
    def summary_function(self) -> str | None:
        """The function that `summary_activation` names."""
        return None if self.summary_activation is None else ACTIVATIONS[self.summary_activation]

    @property
    def classifier_dropout(self) -> float:
        """The dropout before the token classifier: a key that a file may have, 0.1 otherwise, as in transformers."""
        given = self.extra.get("classifier_dropout", self.extra.get("hidden_dropout"))
        return 0.1 if given is None else float(given)

    def score_scale(self, layer: int) -> float:
        """What a layer's products of queries and keys are multiplied by."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def heads(self, layer: int) -> list[int]:
        """The heads of a layer that are not pruned, numbered as in the whole model."""
        gone = self.pruned_heads.get(layer, ())
        return [head for head in range(self.n_head) if head not in gone]

    def pruned(self, more: Mapping[int, Iterable[int]]) -> dict[int, list[int]]:
        """What `pruned_heads` is once these heads, by layer, are pruned too."""
        layers = [*self.pruned_heads, *(layer for layer in more if layer not in self.pruned_heads)]
        gone = {layer: {*self.pruned_heads.get(layer, ()), *more.get(layer, ())} for layer in layers}
        return {layer: sorted(heads) for layer, heads in gone.items() if heads}

    @property
    def quantization(self) -> str | None:
        """What weights are quantized to, "int8" or None; ConfigError where a file says that another program did it."""
        found = self.extra.get("quantization_config")
        if found in (None, INT8):
            return None if found is None else "int8"
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise ConfigError(
            f"quantization_config: expected {INT8}, found the method {shortened(repr(method))}; load what was "
            'quantized, with quantization="int8"'
        )

    @property
    def quantizer(self) -> str | None:
        """The program that has quantized the weights: "gpt2-multi" in int8, or another; None where none has."""
        found = self.extra.get("quantization_config")
        return found if found is None else str(found.get("quant_method") if isinstance(found, Mapping) else found)

    @property
    def use_return_dict(self) -> bool:
        """Whether a call returns a dataclass where it is not told otherwise, or else a tuple."""
        return self.return_dict and not self.torchscript

    @property
    def is_encoder_decoder(self) -> bool:
        """Other libraries ask for it: a GPT-2 is a decoder."""
        return False

    @property
    def _attn_implementation(self) -> str:
        """How PyTorch's model of this configuration computes attention, which `set_attn_implementation` changes."""
        return str(self.extra.get("_attn_implementation", "sdpa"))

    @_attn_implementation.setter
    def _attn_implementation(self, name: str) -> None:
        self._keep("_attn_implementation", name)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> GPT2Config:
        """Other libraries ask for the part that reads text: the whole, whichever is asked for."""
        return self

    def replace(self, **changes: Any) -> GPT2Config:
        """A new configuration with these settings changed at once; aliases and `num_labels` are understood."""
        changes = _as_fields(changes)
        if "id2label" in changes:
            changes.setdefault("label2id", {})
        changes["extra"] = (
            {**self.extra, **changes["extra"]} if changes.get("extra") else changes.get("extra", self.extra)
        )
        return type(self)(**{**vars(self), **changes})

    @classmethod
    def for_model(cls, model_type: str, **settings: Any) -> GPT2Config:
        """A configuration of a kind of model, which has to be "gpt2", as transformers' AutoConfig makes one."""
        return cls.from_dict({"model_type": model_type}, **settings)

    @classmethod
    def from_archive(cls, name: str) -> GPT2Config:
        """The configuration of a published GPT-2 (`gpt2`, `gpt2-medium`, `gpt2-xl`, ...), without a network."""
        for short, known in ARCHIVE.items():
            if name in (short, known.hub_id):
                _, n_layer, n_head, n_embd = known
                return cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd, architectures=["GPT2LMHeadModel"])
        raise ConfigError(f"{name!r} is not a published GPT-2 that is known here; those are {', '.join(ARCHIVE)}")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> GPT2Config:
        """Make one from config.json's keys; keys that are not GPT-2's are kept in `extra`.

        `overrides` are settings that are changed. With `return_unused_kwargs` the answer is a pair: the configuration,
        and those of `overrides` that are no settings.
        """
        keys = config_dict
        _check_type(keys.get("model_type", "gpt2"))
        known = {key: value for key, value in keys.items() if key in _KEYS}
        if keys and not known and "model_type" not in keys:
            raise ConfigError(f"none of these keys is one of a GPT-2 configuration: {', '.join(sorted(keys)[:5])}")
        extra = {key: value for key, value in keys.items() if key not in known and key != "model_type"}
        return cls(**_resolved(known), extra=extra, from_file=frozenset(keys))._changed(overrides)

    def _changed(self, overrides: dict[str, Any]) -> GPT2Config:
        wanted = overrides.pop("return_unused_kwargs", False)
        unused = {name: value for name, value in overrides.items() if name not in SETTINGS} if wanted else {}
        overrides = {name: value for name, value in overrides.items() if name not in unused}
        config = self.replace(**overrides) if overrides else self
        return cast(GPT2Config, (config, unused)) if wanted else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str], **overrides: Any) -> GPT2Config:
        """Read a config.json; `overrides` are as in `from_dict`."""
        keys = read_json(Path(json_file), damaged=ConfigError)
        try:
            config = cls.from_dict(keys)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(json_file)}: {shortened(str(error), 600)}") from None
        except RecursionError:
            raise ConfigError(f"{os.fspath(json_file)}: nested too deeply; it may be damaged") from None
        return config._changed(overrides)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **given: Any) -> GPT2Config:
        """Read the config.json of a model folder, or of a model on the hub; then change settings.

        `given` says where the file is (`revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` and so on, as
        in `from_pretrained` of a model), and which settings are changed, as in `from_dict`.
        """
        path, overrides = _find(pretrained_model_name_or_path, given)
        config = cls.from_json_file(path)
        config.name_or_path = os.fspath(pretrained_model_name_or_path)
        return config._changed(overrides)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **given: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keys of a config.json as they are, and what of `given` does not say where it is."""
        path, others = _find(pretrained_model_name_or_path, given)
        return read_json(path, damaged=ConfigError), others

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Assign these attributes; settings that depend on each other may be among them."""
        settings = {name: value for name, value in config_dict.items() if name in _KEYS}
        vars(self).update(vars(self.replace(**settings)))
        for name in config_dict.keys() - settings.keys():
            setattr(self, name, config_dict[name])

    def update_from_string(self, update_str: str) -> None:
        """Assign settings that a command line gives: "n_embd=10,resid_pdrop=0.2,scale_attn_weights=false"."""
        found = dict(part.partition("=")[::2] for part in update_str.split(","))
        for name in found:
            if name not in _KEYS:
                raise ConfigError(_unknown(name))
        self.update({name: _value(text) for name, text in found.items()})

    def to_dict(self) -> dict[str, Any]:
        """Every setting, under config.json's keys, with the keys and the spellings that a file brought."""
        values = {name: value for name, value in vars(self).items() if name in _KEYS}
        values |= {name: getattr(self, name) for name in self.from_file & _KEYS}
        return copy.deepcopy({**self.extra, **values, "model_type": "gpt2"})

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from a configuration where nothing was said."""
        default = GPT2Config().to_dict() | {"model_type": None}
        return {key: value for key, value in self.to_dict().items() if key not in default or value != default[key]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of config.json; without `use_diff` with every setting that is what it is where nothing was said."""
        default = GPT2Config()
        optional = {f.name for f in fields(self)[_ALWAYS_WRITTEN:]} - self.from_file if use_diff else set()
        own = {key for key in self.extra if key.startswith("_")} - self.from_file  # of this process
        keys = {
            key: value
            for key, value in self.to_dict().items()
            if key not in own and (key not in optional or value != getattr(default, key))
        }
        return json.dumps(keys, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write config.json: whole, or not at all."""
        write_whole(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write config.json into a folder, which is made where it is missing; `options` are those of `push_to_hub`."""
        options = arguments.sort_saving("save_pretrained", options)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / "config.json")
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **options})

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload config.json to a model of the hub: see `files.hub.push`, which `options` are for."""
        return push(self.save_pretrained, repo_id, **arguments.sort_saving("push_to_hub", options))


def _value(text: str) -> Any:
    """What a text of a command line stands for: a number, true, false, null, or itself."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _find(name_or_path: str | os.PathLike[str], given: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where a config.json is, and what was given besides."""
    place, others = arguments.sort(given, arguments.KIND)
    return resolve(name_or_path, **place, allow_patterns=["config.json"]) / "config.json", others


_ALWAYS_WRITTEN = [f.name for f in fields(GPT2Config)].index("pad_token_id")
AutoConfig = GPT2Config  # there is one architecture
