"""`pipeline("text-generation", ...)`: texts to texts on whichever backend is asked for, as in transformers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from gpt2_multi.app import backends
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import DEMO, resolve
from gpt2_multi.files.progress import watched
from gpt2_multi.generation.config import TASK, GenerationConfig, task_options
from gpt2_multi.generation.request import seed_of
from gpt2_multi.generation.rules import noise_streams
from gpt2_multi.model import inputs

if TYPE_CHECKING:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

Result = list[dict[str, Any]]


def pipeline(
    task: str = TASK,
    model: Any = None,
    tokenizer: GPT2Tokenizer | str | os.PathLike[str] | None = None,
    *,
    backend: str | None = None,
    device: str | int | None = None,
    dtype: str | None = None,
    **options: Any,
) -> TextGenerationPipeline:
    """A function from texts to texts.

    model: a name on the hub, a folder, or a language model of any backend, which needs a `tokenizer`; without it, the
    demo model that comes with the library. backend: "pt", "tf" or "flax", by default the first that is installed.
    device: "cpu" or a name such as "cuda:0", or a number as in transformers, -1 for the CPU; by default the fastest.
    dtype: what the model is stored and computed in, by default "float32". `options` are those of `generate`, for every
    call; without them the model's, and what its configuration has under `task_specific_params`.
    Raises InputError and TypeError for what cannot be used.
    """
    if task != TASK:
        raise InputError(f'task: expected "{TASK}", the only one that there is, found {task!r}')
    GenerationConfig.check_names(options)
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

    if model is None or isinstance(model, (str, os.PathLike)):
        row, folder = backends.resolve(backend), resolve(DEMO if model is None else model)
        model, tokenizer = row.load(folder, device_name(row.devices(), device), dtype or "float32"), tokenizer or folder
    elif not hasattr(model, "stream_tokens"):
        raise InputError(f"model: expected a name, a folder or a language model, found {type(model).__name__}")
    elif (backend, device, dtype) != (None, None, None):
        raise InputError("model: is loaded already, on a device, in a dtype; leave out backend, device and dtype")
    if tokenizer is None:
        raise InputError("tokenizer: a model that is loaded already does not know its own; give it, or its folder")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = GPT2Tokenizer.from_pretrained(tokenizer)
    inputs.check_tokenizer(tokenizer)
    return TextGenerationPipeline(model, tokenizer, options)


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
    """What `pipeline` gives: call it with a text, a list of texts, or anything that yields texts."""

    def __init__(self, model: Any, tokenizer: GPT2Tokenizer, options: dict[str, Any] | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options = task_options(model.config) | (options or {})

    def __call__(
        self,
        text_inputs: Any,
        *,
        batch_size: int = 8,
        return_full_text: bool = True,
        return_tensors: bool = False,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """For a text a list of `{"generated_text": ...}`, one for each returned sequence; for a list a list of those.

        For a generator, a dataset or the like the answer is an iterator, which reads on when it is asked. What a text
        gets does not depend on `batch_size`. `return_full_text=False` leaves the prompt out; `return_tensors` gives
        `{"generated_token_ids": ...}`, prompt and end token included. `options` are those of `generate`, but for
        `return_dict_in_generate` and what belongs to it; they win over those of the pipeline, and these over the
        model's, in whose place a `generation_config` stands where it is given.
        """
        config = self.model.generation_config.resolve(generation_config, self.options | options)
        if config.records:
            raise InputError("return_dict_in_generate: a pipeline gives texts; leave it out, or call model.generate")
        if return_tensors and config.prompt_lookup_num_tokens:
            raise InputError("return_tensors: cannot be used with prompt_lookup_num_tokens; leave out one of the two")
        inputs.check_size("batch_size", batch_size, 1)
        inputs.check_truth("return_tensors", return_tensors)
        batches = Batches(self.model, self.tokenizer, config, batch_size, return_full_text, return_tensors)
        if isinstance(text_inputs, str):
            return next(batches.results([text_inputs]))
        if isinstance(text_inputs, (list, tuple)):
            batches.check_seeds(len(text_inputs))
            return list(watched(batches.results(text_inputs), "Generating", len(text_inputs)))
        return batches.results(items(text_inputs))


def items(texts: Any) -> Iterator[Any]:
    """The items of anything that has some; a dataset may have a length and no iterator."""
    if hasattr(texts, "__iter__"):
        return iter(texts)
    if not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise InputError(f"text_inputs: expected a text, or what yields texts, found {type(texts).__name__}")
    return (texts[i] for i in range(len(texts)))


@dataclass(frozen=True)
class Batches:
    """One call of a pipeline: what it makes of texts, `size` of them at once."""

    model: Any
    tokenizer: GPT2Tokenizer
    config: GenerationConfig
    size: int
    full_text: bool  # with the prompt
    as_ids: bool  # instead of texts

    def results(self, texts: Iterable[str]) -> Iterator[Result]:
        """The results of texts, in their order."""
        done, rest = 0, iter(texts)
        while batch := list(islice(rest, min(self.size, sys.maxsize))):
            for text in batch:
                inputs.check_text("text_inputs", text)
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

    def batch(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Result]:
        """The results of a batch, in its order."""
        results = [Result() for _ in texts]
        for rows in self.groups(texts):
            made = self.generate([texts[i] for i in rows], [seeds[i] for i in rows])
            for row, result in zip(rows, made, strict=True):
                results[row] = result
        return results

    def groups(self, texts: Sequence[str]) -> list[list[int]]:
        """Which prompts are read at once: those of one length, where `max_length` makes it decide what may follow."""
        if self.config.max_length is None or self.config.max_new_tokens is not None:
            return [list(range(len(texts)))]
        lengths = [len(self.tokenizer(text).input_ids) for text in texts]
        return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]

    def generate(self, texts: list[str], seeds: list[int]) -> Iterator[Result]:
        """The results of prompts that are read at once."""
        config = replace(self.config, seed=seeds, return_dict_in_generate=self.as_ids)
        output = self.model.generate(texts, generation_config=config, tokenizer=self.tokenizer)
        name, answers = ("generated_token_ids", output.token_ids) if self.as_ids else ("generated_text", output)
        for prompt, answer in zip(texts, answers, strict=True):
            several = answer if config.num_return_sequences > 1 else [answer]
            skipped = 0 if self.full_text or self.as_ids else len(prompt)
            yield [{name: one[skipped:]} for one in several]
