"""The model and the tokenizer that a run begins from: named ones, or new ones."""

from __future__ import annotations

import hashlib
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_multi.app.train.beginning.choices import Asked
from gpt2_multi.errors import GPT2Error, InputError, TokenizerError
from gpt2_multi.files.documents import documents
from gpt2_multi.files.hub import WEIGHTS, matches, resolve
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.checkpoint import read_config
from gpt2_multi.model.checkpoint.saving import save
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.weights import Weight, table
from gpt2_multi.tokenizer.fast import AutoTokenizer
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

LEARNED = "train:"  # what --tokenizer begins with where it is to learn one
TOKENIZER = "gpt2"  # of a model that begins from random weights


class Model(NamedTuple):
    """What is trained: its folder, None of one that is new, its tokenizer and its configuration."""

    source: Path | None
    tokenizer: GPT2Tokenizer
    config: GPT2Config


def chosen(asked: Asked) -> Model:
    """The model that was asked for; InputError where it cannot be trained."""
    name = asked.model or ""
    source = None if "=" in name and not Path(name).exists() else resolve(name)
    tokenizer = tokenizer_for(asked, source)
    config = new_config(name, tokenizer) if source is None else read_config(source)
    check_tokenizer(tokenizer, config, asked, source)
    if config.quantization is not None:
        raise InputError(f"--model {name}: is in int8, which does not train; name the model that it was made of")
    if asked.lora and source is None:
        raise InputError("--lora: adapters of random weights learn nothing; give a trained --model, or leave it out")
    return Model(source, tokenizer, config)


def tokenizer_for(asked: Asked, source: Path | None) -> GPT2Tokenizer:
    """The tokenizer that was named, or that of the model; or one that learns from the data."""
    given = asked.tokenizer or (TOKENIZER if source is None else str(source))
    if not given.startswith(LEARNED):
        try:
            return AutoTokenizer.from_pretrained(given)
        except GPT2Error as error:
            ways = "--tokenizer train:2000 learns one from the data, --tokenizer demo is there"
            raise InputError(f"{error}; {ways}" if source is None else f"{error}; give --tokenizer") from None
    size = given.removeprefix(LEARNED)
    if not size.isdecimal():
        raise InputError(f"--tokenizer: expected train: and how many tokens, such as train:2000, found {given!r}")
    if source is not None:
        raise InputError(
            f"--tokenizer {given}: the model knows its own tokens; begin from sizes (--model n_layer=6,...)"
        )
    if "-" in asked.data:
        raise InputError(f"--tokenizer {given}: reads the data twice, which standard input is not; give a file")
    return GPT2Tokenizer.train(documents(asked.data, asked.field), int(size))


def check_tokenizer(tokenizer: GPT2Tokenizer, config: GPT2Config, asked: Asked, source: Path | None) -> None:
    """InputError where the tokenizer has tokens that the model has not, or gives them other ids than the model's."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"--tokenizer: has {len(tokenizer)} tokens, more than the vocabulary of --model {asked.model} "
            f"({config.vocab_size}); take the model's own, or one with fewer"
        )
    if asked.tokenizer and source is not None:
        with suppress(TokenizerError):  # the model has none
            own = GPT2Tokenizer.from_pretrained(source)
            if own.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"--tokenizer {asked.tokenizer}: its ids are not those of {asked.model}; leave it out")


def new_config(sizes: str, tokenizer: GPT2Tokenizer) -> GPT2Config:
    """A configuration of sizes such as n_layer=6,n_head=6,n_embd=384, with the vocabulary of a tokenizer."""
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end)
    config.update_from_string(sizes)
    return config


def new_weights(folder: Path, config: GPT2Config, seed: int) -> Path:
    """A model folder with random weights, which are the same for every framework."""
    sources = [(row, np.dtype(np.float32), partial(first_value, row, seed)) for row in table(config)]
    save(folder, config, GenerationConfig.of(config), sources, "lm", "5GB")
    return folder


def first_value(row: Weight, seed: int) -> Any:
    """The first value of a row of the table, as its initialisation says."""
    if not row.std:
        return np.full(row.shape, row.constant, np.float32)
    generator = np.random.default_rng([seed, zlib.crc32(row.name.encode())])
    return generator.standard_normal(row.shape, np.float32) * np.float32(row.std)


def weights_hash(folder: Path) -> str:
    """What says of a model folder that its weights are the same."""
    hashed, patterns = hashlib.sha256(), [pattern for names in WEIGHTS.values() for pattern in names]
    for path in sorted(path for path in folder.iterdir() if path.is_file() and matches(path.name, patterns)):
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()
