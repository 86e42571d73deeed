"""The command `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gpt2_multi.app import backends
from gpt2_multi.app.generate.writer import NEW_TOKENS, Writer
from gpt2_multi.app.terminal import BACKEND, DEVICE, DTYPE, MODEL, print_pieces, text_of
from gpt2_multi.files.hub import resolve
from gpt2_multi.files.progress import busy, watched
from gpt2_multi.generation.config import GenerationConfig

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
OF_FILES = ("output", "field", "batch_size")


@click.command()
@click.argument("prompt", required=False)
@MODEL
@BACKEND
@DEVICE
@DTYPE
@click.option("--quantize", type=click.Choice(["int8"]), help="Multiply integers: less memory, and on a CPU faster.")
@click.option("--max-new-tokens", type=int, help=f"Default: {NEW_TOKENS}, or as many as the model has room for.")
@click.option("--temperature", type=float, help="Above 1 bolder, below 1 safer.")
@click.option("--top-k", type=int, help="Choose among the k likeliest tokens; 0 for all. Default: the model's, or 50.")
@click.option("--top-p", type=float, help="Choose among the likeliest tokens that together have this probability.")
@click.option("--min-p", type=float, help="Choose among tokens at least so many times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1, tokens that were there become less likely.")
@click.option("--seed", type=int, help="Default: 0. The same seed gives the same text, whichever the backend.")
@click.option("--num-beams", type=int, help="Follow so many texts at once, and print the likeliest.")
@click.option("--num-return-sequences", type=int, help="How many texts to make. Default: 1.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option("--stream", is_flag=True, help="Print the text while it is made.")
@click.option("--greedy", is_flag=True, help="Always take the likeliest token instead of sampling.")
@click.option("--interactive", is_flag=True, help="Go on by turns: what is typed, what the model makes of it, ...")
@click.option("--prompts", metavar="FILE", help="Continue each line of a .txt, each row of a .jsonl or .parquet.")
@click.option("--output", metavar="FILE", type=click.Path(dir_okay=False), help="Where the texts go, in JSON lines.")
@click.option("--field", help='Which field of a row is the prompt. Default: "prompt".')
@click.option("--batch-size", type=click.IntRange(1), help="How many prompts at once. Default: 8.")
def generate(
    prompt: str | None,
    model: str,
    backend: str | None,
    device: str | None,
    dtype: str,
    quantize: str | None,
    stop: tuple[str, ...],
    stream: bool,
    greedy: bool,
    interactive: bool,
    prompts: str | None,
    output: str | None,
    field: str | None,
    batch_size: int | None,
    **options: Any,
) -> None:
    """Continue PROMPT, which is read from standard input where it is left out or "-".

    The text is a sample, with seed 0 unless --seed says otherwise, so that one command line gives one text; --greedy
    turns sampling off, and the sampling options with it. The last line end of standard input is not part of the prompt.
    An empty prompt starts a new text.

    With --prompts and --output each prompt of a file is continued as it would be alone, and the same command goes on
    where it was stopped. With --interactive you write by turns with the model; /help there says how.
    """
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"stop_strings": list(stop)} if stop else {}
    files = {"--output": output, "--field": field, "--batch-size": batch_size}
    _check_modes(prompt, stream, interactive, prompts, [name for name, value in files.items() if value is not None])
    _check_options(given, "--stream" if stream else "--interactive" if interactive else None, greedy)
    text = "" if prompts or (interactive and prompt is None) else text_of(prompt, "PROMPT")
    text = text if prompt not in (None, "-") else text.removesuffix("\n").removesuffix("\r")
    writer = Writer.load(backends.resolve(backend), model, device, dtype, quantize)
    config = _resolve_options(writer.config, given, greedy, stream or interactive)
    writer = replace(writer, config=config, new_tokens=given.get("max_new_tokens"))
    if interactive:
        from gpt2_multi.app.generate.interactive import interact

        interact(writer, text)
    elif prompts is not None and output is not None:
        from gpt2_multi.app.generate.prompts import continue_all, run_of

        run = run_of(resolve(model), writer, dtype, quantize)
        continue_all(writer, prompts, Path(output), field, batch_size or 8, run)
    else:
        _print_text(writer, text, stream)


def _print_text(writer: Writer, text: str, stream: bool) -> None:
    """Print a text, or several, with its prompt."""
    count = writer.count(text, "PROMPT")
    if writer.config.num_beams == writer.config.num_return_sequences == 1:
        pieces: Iterator[str] = writer.stream(text, count)
        print_pieces([text], pieces if stream else ["".join(watched(pieces, "Generating", count))])
        return
    with busy("Generating"):
        (made,) = writer.write([text], **(writer.one_text or {}))
    for i, new in enumerate(made, 1):
        print_pieces([f"======== {i} of {len(made)} ========\n"] if len(made) > 1 else [], [text, new])


def _resolve_options(own: GenerationConfig, given: Mapping[str, Any], greedy: bool, streamed: bool) -> GenerationConfig:
    """The model's options with those of the command, which turn off what of the model's does not go with them."""
    beams = given.get("num_beams", own.num_beams)
    options: dict[str, Any] = {"do_sample": not greedy, "return_dict_in_generate": False}
    options |= {"output_scores": False, "output_logits": False}
    options |= {} if greedy and beams == 1 else {"prompt_lookup_num_tokens": None}
    options |= {"num_beams": 1} if streamed else {}
    options |= {"num_return_sequences": 1} if streamed or (greedy and beams == 1) else {}
    return own.with_options(options | {name: value for name, value in given.items() if name != "max_new_tokens"})


def _check_modes(
    prompt: str | None, stream: bool, interactive: bool, prompts: str | None, of_files: Sequence[str]
) -> None:
    """Refuse what does not go together."""
    if of_files and prompts is None:
        raise click.UsageError(f"{of_files[0]} is for --prompts, which is not there; give both, or none")
    if prompts is not None and "--output" not in of_files:
        raise click.UsageError("--prompts needs --output, the file that the texts go to; give it too")
    modes = {"PROMPT": prompt is not None, "--stream": stream, "--interactive": interactive}
    if prompts is not None and (found := [name for name, is_there in modes.items() if is_there]):
        raise click.UsageError(f"--prompts has the prompts, and writes to a file; leave out {found[0]}")
    if interactive and stream:
        raise click.UsageError("--interactive prints a text while it is made anyway; leave out --stream")
    if interactive and prompt == "-":
        raise click.UsageError("--interactive reads what is typed from standard input; give PROMPT itself")


def _check_options(given: Mapping[str, Any], streaming: str | None, greedy: bool) -> None:
    """Refuse what cannot be used before anything is loaded."""
    beams, several = given.get("num_beams", 1), given.get("num_return_sequences", 1)
    useless = [f"--{name.replace('_', '-')}" for name in SAMPLING if name in given]
    useless += ["--num-return-sequences"] if several > 1 and beams == 1 else []
    if greedy and useless:
        raise click.UsageError(f"--greedy does not sample, so that {', '.join(useless)} would change nothing; drop one")
    if streaming and several > 1:
        raise click.UsageError(f"{streaming} prints one text; leave out --num-return-sequences")
    if streaming and beams > 1:
        raise click.UsageError(f"{streaming} prints tokens as they come, which beams do not; leave out --num-beams")
    GenerationConfig(do_sample=not greedy, **given)
