"""The command `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from gpt2_multi.app import backends
from gpt2_multi.app.terminal import BACKEND, DTYPE, MODEL, print_pieces, text_of, tokenizer_of
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import resolve
from gpt2_multi.files.progress import busy, watched
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig

if TYPE_CHECKING:
    from gpt2_multi.model.config import GPT2Config
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

NEW_TOKENS = 100
SAMPLING = ("temperature", "top_k", "top_p", "seed", "num_return_sequences")


@click.command()
@click.argument("prompt", required=False)
@MODEL
@BACKEND
@DTYPE
@click.option("--quantize", type=click.Choice(["int8"]), help="Multiply integers: less memory, and on a CPU faster.")
@click.option("--max-new-tokens", type=int, help=f"Default: {NEW_TOKENS}, or as many as the model has room for.")
@click.option("--temperature", type=float, help="Above 1 bolder, below 1 safer.")
@click.option("--top-k", type=int, help="Choose among the k likeliest tokens; 0 for all. Default: the model's, or 50.")
@click.option("--top-p", type=float, help="Choose among the likeliest tokens that together have this probability.")
@click.option("--repetition-penalty", type=float, help="Above 1, tokens that were there become less likely.")
@click.option("--seed", type=int, help="Default: 0. The same seed gives the same text, whichever the backend.")
@click.option("--num-return-sequences", type=int, help="How many texts to make. Default: 1.")
@click.option("--stream", is_flag=True, help="Print the text while it is made.")
@click.option("--greedy", is_flag=True, help="Always take the likeliest token instead of sampling.")
def generate(
    prompt: str | None,
    model: str,
    backend: str | None,
    dtype: str,
    quantize: str | None,
    stream: bool,
    greedy: bool,
    **options: Any,
) -> None:
    """Continue PROMPT, which is read from standard input where it is left out or "-".

    The text is a sample, with seed 0 unless --seed says otherwise, so that one command line gives one text; --greedy
    turns sampling off, and the sampling options with it. The last line end of standard input is not part of the prompt.
    An empty prompt starts a new text.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _check_options(given, stream, greedy)
    text = text_of(prompt, "PROMPT")
    text = text if prompt not in (None, "-") else text.removesuffix("\n").removesuffix("\r")
    row = backends.resolve(backend)
    folder = resolve(model)
    tokenizer = tokenizer_of(str(folder))
    language_model = row.load(folder, row.devices()[0], dtype, quantization=quantize)
    given.setdefault("max_new_tokens", min(NEW_TOKENS, _tokens_left(language_model.config, tokenizer, text)))
    config = _resolve_options(language_model.generation_config, given, greedy, stream)
    how = {"generation_config": config, "tokenizer": tokenizer, **row.one_text}
    if config.num_beams == config.num_return_sequences == 1:
        pieces = language_model.stream(text, **how)
        print_pieces([text], pieces if stream else ["".join(watched(pieces, "Generating", config.max_new_tokens))])
    else:
        with busy("Generating"):
            made = language_model.generate(text, **how)
        _print_texts([made] if isinstance(made, str) else made)


def _resolve_options(own: GenerationConfig, given: dict[str, Any], greedy: bool, stream: bool) -> GenerationConfig:
    """The model's options with those of the command, which turn off what of the model's does not go with them."""
    options: dict[str, Any] = {"do_sample": not greedy, "return_dict_in_generate": False}
    options |= {"output_scores": False, "output_logits": False}
    options |= {} if greedy else {"prompt_lookup_num_tokens": None}
    options |= {"num_beams": 1} if stream else {}
    options |= {"num_return_sequences": 1} if stream or (greedy and own.num_beams == 1) else {}
    return own.with_options(options | given)


def _check_options(given: dict[str, Any], stream: bool, greedy: bool) -> None:
    """Refuse what cannot be used before anything is loaded."""
    useless = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    if greedy and useless:
        raise click.UsageError(f"--greedy does not sample, so that {', '.join(useless)} would change nothing; drop one")
    if stream and given.get("num_return_sequences", 1) > 1:
        raise click.UsageError("--stream prints one text; leave out --num-return-sequences")
    GenerationConfig(do_sample=not greedy, **given)


def _tokens_left(config: GPT2Config, tokenizer: GPT2Tokenizer, text: str) -> int:
    """How many tokens a text has room for behind it."""
    length = len(texts.encode(text, tokenizer, config))
    if length >= config.n_positions:
        raise InputError(
            f"PROMPT: {length} tokens leave no room, for the model can read {config.n_positions}; shorten it"
        )
    return config.n_positions - length


def _print_texts(found: Sequence[str]) -> None:
    for i, text in enumerate(found, 1):
        rule = [f"======== {i} of {len(found)} ========\n"] if len(found) > 1 else []
        print_pieces([*rule, text])
