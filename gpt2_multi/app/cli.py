"""The command `gpt2-multi`, with the commands that other packages bring as entry points.

Text goes to standard output, all else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt2_multi import __version__
from gpt2_multi.app import backends
from gpt2_multi.app.terminal import Commands
from gpt2_multi.errors import InputError
from gpt2_multi.files.hub import DEMO, resolve
from gpt2_multi.files.progress import busy, watched
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.model.fields import DTYPES

if TYPE_CHECKING:
    from gpt2_multi.model.config import GPT2Config
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer

ENTRY_POINTS = "gpt2_multi.commands"
NEW_TOKENS = 100
SAMPLING = ("temperature", "top_k", "top_p", "seed", "num_return_sequences")


class OpenCommands(Commands):
    """A group that has the commands of other packages too: entry points, each loaded when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of all commands, in order."""
        return sorted([*super().list_commands(context), *entry_points(group=ENTRY_POINTS).names])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of a name, or None."""
        found: list[click.Command] = [entry.load() for entry in entry_points(group=ENTRY_POINTS, name=name)]
        return found[0] if found else super().get_command(context, name)


@click.group(cls=OpenCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gpt2-multi")
def main() -> None:
    """GPT-2 for PyTorch, TensorFlow and JAX."""


MODEL = click.option(
    "--model",
    default=str(DEMO),
    show_default="demo",
    help="The built-in demo model, a folder, or a name on the Hugging Face hub such as gpt2.",
)


@main.command()
@click.argument("prompt", required=False)
@MODEL
@click.option("--backend", type=click.Choice(list(backends.BACKENDS)), help="Default: the first that is installed.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="What it computes in.")
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
    text = _text(prompt, "PROMPT")
    text = text if prompt not in (None, "-") else text.removesuffix("\n").removesuffix("\r")
    row = backends.resolve(backend)
    folder = resolve(model)
    tokenizer = _tokenizer(str(folder))
    language_model = row.load(folder, row.devices()[0], dtype, quantization=quantize)
    given.setdefault("max_new_tokens", min(NEW_TOKENS, _tokens_left(language_model.config, tokenizer, text)))
    config = _resolve_options(language_model.generation_config, given, greedy, stream)
    how = {"generation_config": config, "tokenizer": tokenizer, **row.one_text}
    if config.num_beams == config.num_return_sequences == 1:
        pieces = language_model.stream(text, **how)
        _print_pieces([text], pieces if stream else ["".join(watched(pieces, "Generating", config.max_new_tokens))])
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


def _text(given: str | None, name: str) -> str:
    """An argument, or else what standard input holds; it has to be UTF-8."""
    if given is not None and given != "-":
        data, source = given.encode(errors="surrogateescape"), name
    elif sys.stdin is None:
        raise click.UsageError(f"expected {name}, found standard input closed; give {name} as an argument")
    elif given is None and sys.stdin.isatty():
        raise click.UsageError(f"expected {name}, found none; give it, or pipe it in")
    else:
        data, source = sys.stdin.buffer.read(), "standard input"
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: expected UTF-8, found the byte 0x{data[error.start]:02x} at {error.start}; convert it first"
        ) from None


def _tokenizer(model: str) -> GPT2Tokenizer:
    from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer  # after the options are known to be right

    return GPT2Tokenizer.from_pretrained(model, split_special_tokens=True)  # what is typed or piped in is text


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
        _print_pieces([*rule, text])


def _print_pieces(*parts: Iterable[str]) -> None:
    for part in (*parts, ["\n"]):
        for piece in part:
            sys.stdout.write(piece)
            sys.stdout.flush()


@main.command()
@click.argument("text", required=False)
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print one object with the lists `ids` and `tokens`.")
def tokenize(text: str | None, model: str, as_json: bool) -> None:
    """Print the id and the token, as vocab.json spells it, of each token of TEXT, one per line.

    TEXT is read from standard input where it is left out or "-", to the last byte.
    """
    given = _text(text, "TEXT")
    tokenizer = _tokenizer(model)
    ids = tokenizer(given).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if as_json:
        _print_pieces([json.dumps({"ids": ids, "tokens": tokens}, ensure_ascii=False)])
    else:
        sys.stdout.write("".join(f"{token_id}\t{token}\n" for token_id, token in zip(ids, tokens, strict=True)))
        sys.stdout.flush()


@main.command()
@click.argument("target", metavar="DIR")
@MODEL
def export(target: str, model: str) -> None:
    """Write a SavedModel to DIR, from texts to texts, which TensorFlow alone loads and TensorFlow Serving serves.

    A SavedModel that is there is replaced. TensorFlow Serving reads numbered versions of a model: take a DIR such as
    served/gpt2/1. Options of a request win over those of the model's generation_config.json, which go into the file.
    """
    row = backends.resolve("tf")
    folder = resolve(model)
    tokenizer = _tokenizer(str(folder))
    with busy("Exporting"):
        row.load(folder, "cpu").export_saved_model(target, tokenizer=tokenizer)
    size = sum(file.stat().st_size for file in Path(target).rglob("*") if file.is_file())
    _print_pieces([f"{target}: {size / 1e6:.1f} MB, with tokenize, logits, generate and serving_default"])


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def doctor(as_json: bool) -> int:
    """Check this machine: versions, devices, and whether each computes known logits rightly.

    Every installed backend computes the demo model on each of its devices, in each dtype, and is compared with NumPy in
    float64. The exit code is 0 only if something was checked and all of it was right.
    """
    from gpt2_multi.app.doctor import examine, show

    diagnosis = examine()
    if as_json:
        _print_pieces([json.dumps(diagnosis.to_dict(), indent=2)])
    else:
        show(diagnosis)
    if not diagnosis.findings:
        backends.resolve()  # which says what to install
    if bad := ", ".join(diagnosis.wrong):
        raise click.ClickException(f"wrong results: {bad}; update the framework or its driver, or use another device")
    return 0
