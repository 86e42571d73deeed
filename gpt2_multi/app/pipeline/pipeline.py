"""`pipeline("text-generation", ...)`: texts and chats to texts on whichever backend is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from gpt2_multi.app import backends
from gpt2_multi.app.pipeline.prompts import READING, Reading, check_prompt, is_chat, items, reading_of
from gpt2_multi.errors import InputError, described
from gpt2_multi.files.hub import DEMO, resolve
from gpt2_multi.files.progress import watched
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import TASK, GenerationConfig, as_generation_config, task_options
from gpt2_multi.generation.request import Given, seed_of
from gpt2_multi.generation.rules import noise_streams
from gpt2_multi.generation.stopping.spelling import Foreign, ids_of, own
from gpt2_multi.model import inputs

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Result = list[dict[str, Any]]
# Arguments beside the options of generation: where a model is loaded from; and those that change nothing here.
PLACE = ("revision", "token", "cache_dir", "local_files_only")
IDLE = ("use_fast", "trust_remote_code", "num_workers", "framework", "use_auth_token", "return_text")
ARGUMENTS = tuple(name for name in Given._fields[2:] if name != "tokenizer")  # of `generate`, handed on


def pipeline(
    task: str | None = TASK,
    model: Any = None,
    tokenizer: GPT2Tokenizer | str | os.PathLike[str] | None = None,
    *,
    config: Any = None,
    backend: str | None = None,
    framework: str | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    batch_size: int = 8,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> TextGenerationPipeline:
    """A function from texts to texts.

    model: a name on the hub, a folder, or a language model of any backend, which needs a `tokenizer`; without it, the
    demo model that comes with the library. backend: "pt", "tf" or "flax", by default the first that is installed;
    framework is another name for it. device: "cpu" or a name such as "cuda:0", or a number as in transformers, -1 for
    the CPU; by default, and with device_map="auto", the fastest. dtype, or torch_dtype: what the model is stored and
    computed in, by default "float32". config and model_kwargs: for `from_pretrained`. `options` are `revision`, `token`
    and the like, and those of a call, for every call; without them the model's, and what its configuration has under
    `task_specific_params`.
    Raises InputError and TypeError for what cannot be used.
    """
    if task not in (TASK, None):
        raise InputError(f'task: expected "{TASK}", the only one that there is, found {task!r}')
    place = {name: options.pop(name) for name in PLACE if name in options}
    options = {name: value for name, value in options.items() if name not in IDLE}
    backend = one_of("framework", framework, "backend", backend)
    dtype = one_of("torch_dtype", torch_dtype, "dtype", dtype)
    check_options(options)
    if model is None or isinstance(model, (str, os.PathLike)):
        row, folder = backends.resolve(backend), resolve(DEMO if model is None else model, **place)
        more = {**({} if config is None else {"config": config}), **(model_kwargs or {})}
        for name in ("torch_dtype", "dtype"):
            dtype = one_of("model_kwargs", more.pop(name, None), "dtype", dtype)
        device_map = one_of("model_kwargs", more.pop("device_map", None), "device_map", device_map)
        if is_spread(device_map, more):
            check_alone(device)
            more["device_map"], device = device_map, None
        else:
            device = one_device(device_map, device)
        model = row.load(folder, device_name(row.devices(), device), dtype or "float32", **more)
        tokenizer = folder if tokenizer is None else tokenizer
    elif not hasattr(model, "stream_tokens"):
        raise InputError(f"model: expected a name, a folder or a language model, found {type(model).__name__}")
    else:
        model = placed(model, backend, one_device(device_map, device), dtype)
    return TextGenerationPipeline(model, read(tokenizer), options, batch_size)


def one_of(name: str, value: Any, other: str, found: Any) -> Any:
    """What is given under one of two names."""
    if value is not None and found is not None and value != found:
        raise InputError(f"{name}: is {value!r}, and {other} is {found!r}; give one of the two")
    return found if value is None else value


def one_device(device_map: Any, device: Any) -> Any:
    """The device that is given under one of two names; a map may have several names for it."""
    device = one_of("device_map", None if device_map == "auto" else device_map, "device", device)
    return next(iter(device.values())) if isinstance(device, Mapping) and len(set(device.values())) == 1 else device


def is_spread(device_map: Any, loading: Mapping[str, Any]) -> bool:
    """Whether a model is to be in several places, or on a disk, which is for from_pretrained to arrange."""
    places = list(map(str, device_map.values())) if isinstance(device_map, Mapping) else []
    return loading.get("max_memory") is not None or "disk" in places or len(set(places)) > 1


def check_alone(device: Any) -> None:
    """A model in several places is not in another one as well."""
    if device is not None:
        raise InputError(f"device: expected none beside a device_map of several places, found {device!r}; give one")


def read(tokenizer: GPT2Tokenizer | str | os.PathLike[str] | None) -> GPT2Tokenizer:
    """A tokenizer, or that of a folder or of a name on the hub."""
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

    if tokenizer is None:
        raise InputError("tokenizer: a model that is loaded already does not know its own; give it, or its folder")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = GPT2Tokenizer.from_pretrained(tokenizer)
    inputs.check_tokenizer(tokenizer)
    return tokenizer


def placed(model: Any, backend: str | None, device: Any, dtype: Any) -> Any:
    """A model that is loaded already: it has a backend and a dtype, and PyTorch moves it."""
    name = backend_of(model)
    if backend in (None, name) and dtype is None:
        if device is None:
            return model
        if name == "pt":
            return model.to(device_name(backends.BACKENDS[name].devices(), device))
    raise InputError("model: is loaded already, on a device, in a dtype; leave out backend, device and dtype")


def backend_of(model: Any) -> str:
    """The name of the backend of a model, or of what wraps it, which is PyTorch's."""
    modules = [cls.__module__ for cls in type(model).__mro__]
    rows = backends.BACKENDS.items()
    return next((name for name, row in rows if any(module.startswith(f"{row.package}.") for module in modules)), "pt")


def check_options(options: Mapping[str, Any]) -> None:
    """TypeError for what is neither an argument of a call nor an option of generation."""
    GenerationConfig.check_names(options, [*CALL, *READING, *ARGUMENTS, *PLACE])


def device_name(names: Sequence[str], device: Any) -> str:
    """The name of a device; numbers count the accelerators, -1 is the CPU, and a kind alone means its first."""
    if device is None:
        return names[0]
    if isinstance(device, int) and -1 <= device < len(names) - 1:
        return names[device]  # the CPU is the last
    for name in names:
        if str(device) in (name, name.partition(":")[0]):
            return name
    raise InputError(f"device: expected one of {', '.join(names)}, found {device!r}")


class TextGenerationPipeline:
    """What `pipeline` gives: call it with a text, a chat, a list of either, or anything that yields them."""

    task = TASK

    def __init__(
        self, model: Any, tokenizer: GPT2Tokenizer, options: dict[str, Any] | None = None, batch_size: int = 8
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.options = task_options(model.config) | (options or {})

    @property
    def framework(self) -> str:
        """The name of the model's backend."""
        return backend_of(self.model)

    @property
    def device(self) -> Any:
        """Where a model of PyTorch is; None for the others, which are where their framework computes."""
        return getattr(self.model, "device", None)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the model and its tokenizer in one folder; `options` are those of the model's `save_pretrained`."""
        if not hasattr(self.tokenizer, "save_pretrained"):
            raise InputError(
                f"tokenizer: expected one that can be saved, found {described(self.tokenizer)}; save the model alone"
            )
        self.model.save_pretrained(save_directory, **options)
        self.tokenizer.save_pretrained(save_directory)

    def __call__(self, text_inputs: Any, *, generation_config: GenerationConfig | None = None, **options: Any) -> Any:
        """For a text a list of `{"generated_text": ...}`, one for each returned sequence; for a list a list of those.

        A chat is a list of `{"role": ..., "content": ...}`; its `generated_text` is the chat with the answer. For a
        generator, a dataset or the like the answer is an iterator, which reads on when it is asked. What a text gets
        does not depend on `batch_size`.
        `options` are those of `generate`, but for `return_dict_in_generate` and what belongs to it; they win over those
        of the pipeline, and these over the model's, in whose place a `generation_config` stands where it is given. And
        as in transformers: return_full_text (False leaves the prompt out), return_tensors (`{"generated_token_ids":
        ...}`, prompt and end token included), prefix (is read before each prompt, and not returned), stop_sequence,
        truncation, handle_long_generation, add_special_tokens, tokenizer_encode_kwargs, continue_final_message, tools,
        documents, skip_special_tokens, generate_kwargs.
        """
        given = {**self.options, **options}
        given |= given.pop("generate_kwargs", None) or {}
        given = {name: value for name, value in given.items() if name not in IDLE}
        check_options(given)
        reading = reading_of(self.tokenizer, self.model.config, given)
        answering = Answering.of({name: given.pop(name) for name in CALL if name in given})
        arguments = {name: given.pop(name) for name in ARGUMENTS if name in given}
        if answering.stop_sequence is not None:
            given["stop_strings"] = answering.stop_sequence
        config = self.config(generation_config, given, reading)
        if answering.tensors and config.prompt_lookup_num_tokens:
            raise InputError("return_tensors: cannot be used with prompt_lookup_num_tokens; leave out one of the two")
        size = self.batch_size if answering.batch_size is None else answering.batch_size
        inputs.check_size("batch_size", size, 1)
        batches = Batches(self.model, reading, answering, config, size, arguments)
        if isinstance(text_inputs, str) or is_chat(text_inputs):
            return next(batches.results([text_inputs]))
        if isinstance(text_inputs, (list, tuple)):
            batches.check_seeds(len(text_inputs))
            return list(watched(batches.results(text_inputs), "Generating", len(text_inputs)))
        prompts = items(text_inputs)
        return batches.results(prompts)

    def config(self, given: Any, options: dict[str, Any], reading: Reading) -> GenerationConfig:
        """The options of a call; lengths that count the prompt do not count a prefix."""
        config = as_generation_config(self.model.generation_config).resolve(given, options)
        if config.records:
            raise InputError("return_dict_in_generate: a pipeline gives texts; leave it out, or call model.generate")
        before = len(ids_of(self.tokenizer, reading.prefix)) if reading.prefix else 0
        if before and config.max_length is not None and config.max_new_tokens is None:
            config = replace(config, max_length=config.max_length + before)
        return replace(config, min_length=config.min_length + before) if before and config.min_length else config


@dataclass(frozen=True)
class Answering:
    """What a call of a pipeline is to give."""

    batch_size: int | None = None
    return_full_text: bool | None = None
    return_tensors: bool | None = None
    return_type: Any = None
    clean_up_tokenization_spaces: bool | None = None
    skip_special_tokens: bool | None = None
    stop_sequence: str | Sequence[str] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Answering:
        """The arguments of a call, checked."""
        found = cls(**given)
        for name in ("return_full_text", "return_tensors", "skip_special_tokens", "clean_up_tokenization_spaces"):
            if (value := getattr(found, name)) is not None:
                inputs.check_truth(name, value)
        if found.return_tensors and found.return_full_text is not None:
            raise InputError("return_tensors: cannot be used with return_full_text; leave out one of the two")
        return found

    @property
    def tensors(self) -> bool:
        """Ids are given instead of texts; 0 is what transformers' ReturnType.TENSORS is."""
        return bool(self.return_tensors) or self._type == 0

    @property
    def full_text(self) -> bool:
        """The prompt is given too."""
        return self.return_full_text is not False and self._type != 1

    def spelled(self, tokenizer: GPT2Tokenizer, ids: list[int], config: GenerationConfig, before: list[int]) -> str:
        """What new ids spell after those before; control tokens only where they are not to be skipped."""
        known, clean = own(tokenizer), self.clean_up_tokenization_spaces
        if self.skip_special_tokens is False:
            config = replace(config, eos_token_id=None)
        else:
            ids, before = ([i for i in row if i not in known.control_ids] for row in (ids, before))
        if isinstance(known, Foreign):
            options = {} if clean is None else {"clean_up_tokenization_spaces": clean}
            return texts.spelled(tokenizer, ids, config, before, **options)
        text = texts.spelled(tokenizer, ids, config, before)
        return known.clean_up_tokenization(text) if clean else text

    @property
    def _type(self) -> Any:
        return getattr(self.return_type, "value", self.return_type)


# Arguments of a call that say what it gives, beside how prompts are read.
CALL = (*Answering.__dataclass_fields__, "generate_kwargs")


@dataclass(frozen=True)
class Batches:
    """One call of a pipeline: what it makes of prompts, `size` of them at once."""

    model: Any
    reading: Reading
    answering: Answering
    config: GenerationConfig
    size: int
    arguments: Mapping[str, Any]  # of `generate`

    def results(self, prompts: Iterable[Any]) -> Iterator[Result]:
        """The results of prompts, in their order."""
        done, rest = 0, iter(prompts)
        while batch := list(islice(rest, min(self.size, sys.maxsize))):
            for prompt in batch:
                check_prompt(prompt)
            yield from self.batch(batch, self.seeds(done, len(batch)))
            done += len(batch)

    def check_seeds(self, count: int) -> None:
        """A list of seeds has one for each text."""
        seed = self.config.seed
        if isinstance(seed, (list, tuple)) and len(seed) != count:
            raise InputError(f"seed: expected one number, or one for each of {count} texts, found {len(seed)}")

    def seeds(self, done: int, count: int) -> list[int]:
        """The seed of each of the next prompts, whatever the batches are."""
        seed, rows = self.config.seed, self.config.rows
        if isinstance(seed, (list, tuple)):
            self.check_seeds(max(len(seed), done + count))
            return list(seed[done : done + count])
        first = seed_of(self.config, count) if seed is None else seed + done * rows  # type: ignore[operator]
        return noise_streams(first, count, rows)[::rows]

    def batch(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Result]:
        """The results of a batch, in its order."""
        results = [Result() for _ in prompts]
        read = [self.reading.ids(prompt, self.config) for prompt in prompts]
        for rows in self.groups([len(ids) for ids in read]):
            made = self.generate([prompts[i] for i in rows], [read[i] for i in rows], [seeds[i] for i in rows])
            for row, result in zip(rows, made, strict=True):
                results[row] = result
        return results

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which prompts are read at once: those of one length, where `max_length` makes it decide what may follow."""
        if self.config.max_length is None or self.config.max_new_tokens is not None:
            return [list(range(len(lengths)))]
        return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]

    def generate(self, prompts: Sequence[Any], read: Sequence[list[int]], seeds: list[int]) -> Iterator[Result]:
        """The results of prompts that are read at once."""
        ids, mask = texts.pad(read)
        row, tokenizer = backends.BACKENDS[backend_of(self.model)], self.reading.tokenizer
        config = replace(self.config, seed=seeds)
        given = {"attention_mask": row.to_tensor(self.model, mask), "generation_config": config, **self.arguments}
        output = self.model.generate(row.to_tensor(self.model, ids), tokenizer=tokenizer, **given)
        new = row.to_numpy(output)[:, ids.shape[1] :].tolist()
        made = texts.trim(new, tokenizer, config, self.model.config)
        for i, prompt in enumerate(prompts):
            several = made[i * config.num_return_sequences : (i + 1) * config.num_return_sequences]
            yield [self.answer(prompt, read[i], found) for found in several]

    def answer(self, prompt: Any, read: list[int], new: list[int]) -> dict[str, Any]:
        """What is given for a prompt and the ids that follow it."""
        if self.answering.tensors:
            return {"generated_token_ids": read + new}
        text = self.answering.spelled(self.reading.tokenizer, new, self.config, read)
        return {"generated_text": self.reading.whole(prompt, text) if self.answering.full_text else text}
