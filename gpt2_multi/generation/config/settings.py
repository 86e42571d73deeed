"""GenerationConfig: the options of `generate`, checked when they are given or assigned, and generation_config.json."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from gpt2_multi.errors import InputError, described, nearest
from gpt2_multi.files import arguments
from gpt2_multi.files.hub import push, resolve
from gpt2_multi.files.json_files import read_json, write_whole
from gpt2_multi.generation.config.table import (
    IDLE,
    NAMES,
    OF_CALLS,
    OPTIONS,
    RENAMED,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    is_unsupported,
    plain,
    renamed,
    supported,
)
from gpt2_multi.model import inputs
from gpt2_multi.model.config import TOKENS, GPT2Config, check_config
from gpt2_multi.model.fields import FIELDS

TASK = "text-generation"
UNSAID = 20  # `max_length` where transformers was not told one: that many new tokens
Bias = tuple[tuple[int, ...], float]  # a phrase of ids, and what its last id's logit gets after the others


@dataclass
class GenerationConfig:
    """The options of `generate`, with the names and defaults of transformers 4.57; docs/generation.md explains each.

    Each is checked when it is given or assigned, and together where a configuration is made or used. transformers'
    other options are taken where they change nothing, and kept in `extra`.

    Without `max_new_tokens` and `max_length` (prompt included), 20 new tokens are made. `top_k` 0 and `top_p` 1.0 are
    off; `top_k` is 50 unless it is set. `seed`, one number or one for each prompt, plus the row's number decides every
    sample. Ids in `eos_token_id` end a row, which is then filled with `pad_token_id` (the end token where that is
    None). Raises InputError for a value that cannot be used and TypeError for an unknown option.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    logit_bias: Mapping[Any, float] | Sequence[tuple[Sequence[int], float]] | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    guidance_scale: float | None = None
    prompt_lookup_num_tokens: int | None = None
    num_assistant_tokens: int = 20
    max_matching_ngram_size: int = 2
    sliding_window: bool = False
    seed: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] | None = None
    max_time: float | None = None
    cache_implementation: str | None = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # keys of a file that are not options here

    def __post_init__(self) -> None:
        self.validate()

    def validate(self, strict: bool = False) -> None:
        """Raise InputError for options that cannot be used together; `strict` is transformers', and always so."""
        for wrong, sentence in self._conflicts():
            if wrong:
                raise InputError(sentence)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in OPTIONS:
            return self._keep(name, value)
        value = plain(value)
        value = (value or 0) if name == "top_k" else value
        if value is None and not OPTIONS[name].fits(None):  # as transformers says that an option is not set
            value = getattr(GenerationConfig, name)  # its default
        if not OPTIONS[name].fits(value):
            raise InputError(f"{name}: expected {OPTIONS[name].words}, found {value!r}")
        vars(self)[name] = value

    def _keep(self, name: str, value: Any) -> None:
        """Assign what is no option here: one of transformers, or what somebody keeps under a private name."""
        if name == "extra" or name.startswith("_"):
            vars(self)[name] = value
        elif name in RENAMED:
            self.update(**renamed({name: value}, self.bad_words_ids))
        elif name not in (*WITHOUT_EFFECT, *UNSUPPORTED):
            raise AttributeError(f"GenerationConfig has no option {name!r}{nearest(name, OPTIONS)}")
        elif not supported({name: value}):
            vars(self)["extra"] = {**self.extra, name: value}

    if not TYPE_CHECKING:  # to which a class with a __getattr__ has every attribute

        def __getattr__(self, name: str) -> Any:
            kept = {**IDLE, **vars(self).get("extra", {})}
            if name not in kept:
                raise AttributeError(f"GenerationConfig has no option {name!r}{nearest(name, OPTIONS)}")
            return kept[name]

    def _conflicts(self) -> list[tuple[bool, str]]:
        beams, lookup = self.num_beams > 1, self.prompt_lookup_num_tokens is not None
        several = self.num_return_sequences > 1
        inside = self.output_hidden_states or self.output_attentions
        detailed = self.output_scores or self.output_logits or inside
        return [
            (
                several and not self.do_sample and not beams,
                "num_return_sequences: greedy choice gives one text only; set do_sample=True, or num_beams, or 1",
            ),
            (
                beams and self.num_return_sequences > self.num_beams,
                f"num_return_sequences: {self.num_return_sequences} texts need as many beams; raise num_beams",
            ),
            (
                lookup and (self.do_sample or beams or self.sliding_window),
                "prompt_lookup_num_tokens: is for greedy choice; leave out do_sample, num_beams and sliding_window",
            ),
            (beams and self.sliding_window, "sliding_window: cannot be used with num_beams; leave out one of the two"),
            (
                inside and self.sliding_window,  # which reads tokens again, and shows other things of them
                "sliding_window: cannot be used with output_hidden_states and output_attentions; leave it out",
            ),
            (
                detailed and not self.return_dict_in_generate,
                "output_scores, output_logits, output_hidden_states, output_attentions: ids have no place for them; "
                "set return_dict_in_generate=True",
            ),
            (
                self.is_guided and (lookup or self.sliding_window),
                "guidance_scale: cannot be used with prompt_lookup_num_tokens and sliding_window; leave them out",
            ),
            (
                lookup and self.return_dict_in_generate,
                "return_dict_in_generate: cannot be used with prompt_lookup_num_tokens; leave out one of the two",
            ),
        ]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end tokens: none, one or several."""
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, (list, tuple)) else (self.eos_token_id,)  # type: ignore[return-value]

    @property
    def fill_token_id(self) -> int:
        """What a finished row is filled with."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    @property
    def biases(self) -> list[Bias]:
        """`logit_bias` and `bad_words_ids`, which are ruled out, as (phrase, bias) pairs."""
        return [*_pairs(self.logit_bias), *((tuple(phrase), -math.inf) for phrase in self.bad_words_ids or ())]

    @property
    def stops(self) -> list[str]:
        """The stop strings: none, one or several."""
        return [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings or ())

    @property
    def rows(self) -> int:
        """How many rows each prompt is read in: one per text to return, or one per beam."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences

    @property
    def candidates(self) -> int:
        """Of how many continuations beam search chooses: so many that enough of them cannot be at their end."""
        return self.least_kept * self.num_beams

    @property
    def least_kept(self) -> int:
        """How many tokens top-k, top-p and min-p leave at least: beams need one that is no end token."""
        return max(2, 1 + len(self.eos_token_ids)) if self.num_beams > 1 else 1

    @property
    def is_guided(self) -> bool:
        """Whether each prompt is read a second time, without most of it, for what guides away from that."""
        return self.guidance_scale not in (None, 1)

    @property
    def records(self) -> tuple[str, ...]:
        """What is kept of each step for the caller."""
        wanted = {
            "scores": self.output_scores,
            "logits": self.output_logits,
            "log_probs": self.return_dict_in_generate,
            "hidden_states": self.output_hidden_states,
            "attentions": self.output_attentions,
        }
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def resolve(self, given: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
        """What a call of a model with this configuration does: `given` with the special tokens of this one, or this.

        `options` come on top. Raises InputError and TypeError for what cannot be used.
        """
        if given is None:
            return self.with_options(options)
        given = as_generation_config(given)
        tokens = {name: getattr(self, name) for name in TOKENS if getattr(given, name) is None}
        return replace(given, **tokens).with_options(options)

    def with_options(self, options: dict[str, Any]) -> Self:
        """A copy with these options changed; TypeError, with the nearest name, for one that does not exist.

        One that changes nothing beside the others is warned about.
        """
        self.check_names(options)
        options = renamed(supported(options), self.bad_words_ids)
        if options.get("eos_token_id", 0) is None:  # no end, which is not the same as the model's
            options = {**options, "eos_token_id": []}
        if options.get("max_length") is not None:  # the length of the call wins, whichever way it is given
            options = {"max_new_tokens": None, **options}
        changed = replace(self, **options)
        for name, needed in changed._useless(options):
            warnings.warn(f"{name} changes nothing without {needed}", stacklevel=3)
        return changed

    @staticmethod
    def check_names(options: Iterable[str], arguments: Sequence[str] = ()) -> None:
        """TypeError, with the nearest name, for an option that does not exist, and is none of these arguments."""
        options = list(options)
        for name in OF_CALLS.keys() & options:
            raise TypeError(f"{name}: {OF_CALLS[name]}")
        known = [*(option.name for option in fields(GenerationConfig) if option.name != "extra"), *arguments]
        taken = {*WITHOUT_EFFECT, *UNSUPPORTED, *RENAMED}
        inputs.check_names("generate()", [name for name in options if name not in taken], known, "option")

    def _useless(self, options: dict[str, Any]) -> list[tuple[str, str]]:
        needs = {
            "do_sample=True": (self.do_sample, ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")),
            "num_beams above 1": (self.num_beams > 1, ("length_penalty", "early_stopping")),
            "prompt_lookup_num_tokens": (self.prompt_lookup_num_tokens is not None, ("max_matching_ngram_size",)),
        }
        default = {f.name: f.default for f in fields(self)}
        off = {"top_k": (50, 0)}  # what is the default, or switched off, is no mistake
        return [
            (name, needed)
            for needed, (there, names) in needs.items()
            for name in names
            if not there and name in options and options[name] not in (None, *off.get(name, (default[name],)))
        ]

    def check_streaming(self) -> None:
        """What is streamed is not known better later."""
        if self.num_beams > 1:
            raise InputError("num_beams: beams are not known before the end; leave it out, or call generate")
        if self.return_dict_in_generate:
            raise InputError("return_dict_in_generate: a stream gives tokens only; leave it out, or call generate")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Every id of a phrase has to lie in the vocabulary."""
        for phrase, bias in self.biases:
            name = "bad_words_ids" if bias == -math.inf else "logit_bias"
            inputs.check_vocabulary(name, min(phrase), max(phrase), vocab_size)

    def total_length(self, prompt: int) -> int:
        """How long the longest row may become from a prompt of this length, in tokens."""
        if self.max_new_tokens is None and self.max_length is not None:
            if self.max_length <= prompt:
                raise InputError(f"max_length: {self.max_length} leaves no room after {prompt} prompt tokens; raise it")
            return self.max_length
        return prompt + (20 if self.max_new_tokens is None else self.max_new_tokens)

    def check_context(self, longest: int, new: int, n_positions: int) -> None:
        """The longest prompt and what is to follow have to fit the context, unless it slides."""
        if not self.sliding_window:
            inputs.check_context(longest, new, n_positions)

    @classmethod
    def of(cls, config: GPT2Config) -> Self:
        """The defaults, with the special tokens of a model, and what its file says of generation, as old ones do."""
        given = {name: value for name, value in config.extra.items() if name in OPTIONS and value is not None}
        if given.get("max_length") == UNSAID:
            del given["max_length"]
        tokens = {name: getattr(config, name) for name in TOKENS}
        return cls(**given, **{name: token for name, token in tokens.items() if token != -1})  # "none" in old files

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """What a model of this configuration, ours or one of transformers, generates by."""
        return cls.of(check_config(model_config))

    @classmethod
    def of_folder(cls, folder: Path | None, config: GPT2Config, chosen: Mapping[str, Any]) -> Self:
        """What generation_config.json says; what it leaves open is taken from the model's configuration.

        `chosen` are settings of the configuration that a caller wants otherwise than the files: they win over both. A
        generation_config among them, ours or of transformers, stands in the place of all.
        """
        if chosen.get("generation_config") is not None:
            return cast(Self, replace(as_generation_config(chosen["generation_config"])))
        path = Path(folder or "") / "generation_config.json"
        over = {name: value for name, value in chosen.items() if name in TOKENS or name not in FIELDS}
        return cls._of_keys(str(path), read_json(path) if folder and path.exists() else {}, cls.of(config), over)

    @classmethod
    def _of_keys(cls, source: str, keys: Mapping[str, Any], under: Self, over: Mapping[str, Any]) -> Self:
        """Of the keys of a file: what they leave open is taken from `under`, and `over` wins over them."""
        keys = renamed(keys)
        given = {name: value for name, value in keys.items() if name in OPTIONS and value is not None}
        given = {name: value for name, value in given.items() if not (name in TOKENS and value == -1)}
        extra = {name: value for name, value in keys.items() if name not in OPTIONS}
        if ignored := [name for name, value in extra.items() if is_unsupported(name, value)]:
            warnings.warn(f"{source}: {', '.join(ignored)} is not an option here, and is ignored", stacklevel=4)
        try:
            return replace(under, **{**given, **{name: over[name] for name in over if name in OPTIONS}}, extra=extra)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], config_file_name: str | None = None, **given: Any
    ) -> Self:
        """Read the generation_config.json of a model folder, or of a model on the hub; then change options.

        `given` says where the file is (`revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` and so on, as
        in `from_pretrained` of a model), and which options are changed, as in `from_dict`.
        """
        place, options = arguments.sort(given)
        name = config_file_name or "generation_config.json"
        path = resolve(pretrained_model_name, **place, allow_patterns=[name]) / name
        return cls.from_dict(read_json(path), **options)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> Self:
        """Make one from the keys of a generation_config.json; those that are no options here are kept in `extra`.

        `options` come on top. With `return_unused_kwargs` the answer is a pair: the configuration, and those of
        `options` that are none.
        """
        wanted = options.pop("return_unused_kwargs", False)
        unused = {name: options.pop(name) for name in [*options] if wanted and name not in NAMES}
        config = cls._of_keys("config_dict", config_dict, cls(), {}).with_options(options)
        return cast(Self, (config, unused)) if wanted else config

    def update(self, **options: Any) -> dict[str, Any]:
        """Assign options, and return what is none of them; InputError for what cannot be used."""
        for name, value in options.items():
            if name in NAMES:
                setattr(self, name, value)
        self.validate()
        return {name: value for name, value in options.items() if name not in NAMES}

    def to_dict(self) -> dict[str, Any]:
        """Every option, as JSON can hold it, and the keys that a file brought."""
        own = {name: getattr(self, name) for name in OPTIONS}
        if self.logit_bias is not None:  # JSON's keys are strings, and it has no infinity
            own["logit_bias"] = [[list(phrase), bias] for phrase, bias in self.biases if bias != -math.inf]
            own["bad_words_ids"] = [list(phrase) for phrase, bias in self.biases if bias == -math.inf] or None
        return copy.deepcopy({**self.extra, **own})

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and the keys that a file brought."""
        default = GenerationConfig()
        return {name: x for name, x in self.to_dict().items() if name in self.extra or x != getattr(default, name)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of generation_config.json; without `use_diff` with every option."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write generation_config.json: whole, or not at all."""
        write_whole(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        config_file_name: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write generation_config.json: what differs from the defaults, and the keys that a file brought.

        `options` are those of `push_to_hub`.
        """
        options = arguments.sort_saving("save_pretrained", options)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / (config_file_name or "generation_config.json"))
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **options})

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload generation_config.json to a model of the hub: see `files.hub.push`, which `options` are for."""
        return push(self.save_pretrained, repo_id, **arguments.sort_saving("push_to_hub", options))


def _takes_options(cls: type[GenerationConfig]) -> None:
    """Let the constructor of `dataclass` take what transformers' takes, and suggest a name for what it lacks."""
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **given: Any) -> None:
        if given.keys() <= _FIELDS:
            return plain_init(self, *args, **given)
        extra = given.pop("extra", {})
        cls.check_names(name for name in given if not name.startswith("_"))
        kept = {name: value for name, value in given.items() if name in IDLE and value is not None}
        own = {name: value for name, value in renamed(supported(given)).items() if not name.startswith("_")}
        plain_init(self, *args, **{**own, "extra": {**extra, **kept}})

    cls.__init__ = init  # type: ignore[method-assign]


_takes_options(GenerationConfig)
_FIELDS = {*OPTIONS, "extra"}


def as_generation_config(given: Any) -> GenerationConfig:
    """One of ours, or of transformers: what is not set there is not set here, and what is not here has to be off."""
    if isinstance(given, GenerationConfig):
        return given
    if not hasattr(given, "to_dict"):
        raise InputError(f"generation_config: expected a GenerationConfig, found {described(given)}")
    keys = {name: x for name, x in given.to_dict().items() if not (x is None or x is False or x == {})}
    if keys.get("max_length") == UNSAID:
        del keys["max_length"]
    for name in keys.keys() - NAMES:
        if not name.startswith("_"):
            raise InputError(f"generation_config: {name} is not an option here; set it to None")
    return GenerationConfig(**keys)


def task_options(model: GPT2Config) -> dict[str, Any]:
    """What config.json says of `generate` where texts are continued, under `task_specific_params`."""
    tasks = model.extra.get("task_specific_params")
    own = tasks.get(TASK) if isinstance(tasks, dict) else None
    if not isinstance(own, dict):
        return {}
    return {name: value for name, value in own.items() if name in OPTIONS and value is not None}


def _pairs(given: Any) -> list[Bias]:
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    return [(tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),), float(bias)) for ids, bias in pairs]
