"""`gpt2-multi generate`: the text, how it is printed, and what is refused before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_multi.app import backends
from gpt2_multi.generation import texts
from gpt2_multi.generation.config import GenerationConfig
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.app.conftest import END, copy_of, good, needs_pt, process, refusal

CHARACTERS = "aé日😀"


@needs_pt
def test_generate_continues_the_prompt(tiny: Path) -> None:
    text = good("generate", "Hello", "--model", tiny, "--max-new-tokens", "5")
    assert text.startswith("Hello")
    assert text.endswith("\n")
    assert len(text) > len("Hello\n")


@needs_pt
def test_the_text_is_that_of_the_model_s_own_generate(tiny: Path) -> None:
    torch, pt = pytest.importorskip("torch"), pytest.importorskip("gpt2_multi.pt")
    tokenizer, model = GPT2Tokenizer.from_pretrained(tiny), pt.GPT2LMHeadModel.from_pretrained(tiny)
    ids = torch.tensor([tokenizer("Hello").input_ids])
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 9, "seed": 3, "top_k": 9, "temperature": 0.5}
    expected = tokenizer.decode(model.generate(ids, **options)[0].tolist()).removesuffix("<|endoftext|>")
    given = ("--max-new-tokens", "9", "--seed", "3", "--top-k", "9", "--temperature", "0.5")
    assert good("generate", "Hello", "--model", tiny, *given) == expected + "\n"


@needs_pt
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_streamed_text_is_the_same_text(tiny: Path, seed: str) -> None:
    args = ("generate", "Hello", "--model", tiny, "--seed", seed)
    assert good(*args, "--stream") == good(*args)


@needs_pt
def test_what_is_typed_in_is_no_control_token(tiny: Path) -> None:
    text = "<|endoftext|>" * 5  # five of them would have room
    assert GPT2Tokenizer.from_pretrained(tiny)(text).input_ids == [END] * 5
    assert "65 tokens leave no room" in refusal("generate", text, "--model", tiny)


@needs_pt
def test_the_seed_decides_the_text(tiny: Path) -> None:
    args = ("generate", "Hello", "--model", tiny)
    assert good(*args, "--seed", "7") == good(*args, "--seed", "7")
    assert good(*args, "--seed", "7") != good(*args, "--seed", "8")
    assert good(*args) == good(*args, "--seed", "0")
    assert good(*args, "--greedy") != good(*args)


@needs_pt
@pytest.mark.parametrize("how", [("--greedy",), ("--seed", "3"), ("--seed", "3", "--stream", "--top-p", "0.8")])
@pytest.mark.parametrize("other", ["tf", "flax"])
def test_every_backend_writes_the_same_text(tiny: Path, other: str, how: tuple[str, ...]) -> None:
    pytest.importorskip(backends.BACKENDS[other].framework)
    args = ("generate", "Hello", "--model", tiny, "--max-new-tokens", "12", *how)
    assert good(*args, "--backend", other) == good(*args, "--backend", "pt")


@needs_pt
def test_several_texts_are_told_apart(tiny: Path) -> None:
    args = ("generate", "Hi", "--model", tiny, "--max-new-tokens", "4", "--top-k", "3")
    text = good(*args, "--num-return-sequences", "2", "--seed", "5")
    first, second = (good(*args, "--seed", seed) for seed in ("5", "6"))
    assert text == f"======== 1 of 2 ========\n{first}======== 2 of 2 ========\n{second}"


@needs_pt
@pytest.mark.parametrize("args", [(), ("-",)])
def test_the_prompt_comes_from_standard_input(tiny: Path, args: tuple[str, ...]) -> None:
    expected = good("generate", "Hé\n", "--model", tiny)
    assert good("generate", *args, "--model", tiny, stdin="Hé\n\n") == expected
    assert good("generate", *args, "--model", tiny, stdin="Hé\n\r\n") == expected


@needs_pt
def test_an_empty_prompt_starts_a_new_text(tiny: Path, tmp_path: Path) -> None:
    text = good("generate", "", "--model", tiny)
    assert "<|endoftext|>" not in text
    assert text == good("generate", "--model", tiny, stdin="")
    bare = copy_of(tiny, tmp_path, bos_token_id=None)
    assert refusal("generate", "", "--model", bare).startswith("the prompt is empty, and bos_token_id None of")


@needs_pt
def test_the_text_ends_at_the_end_token_which_is_not_shown(tiny: Path, tmp_path: Path) -> None:
    model = backends.resolve("pt").load(tiny, "cpu")
    prompt = GPT2Tokenizer.from_pretrained(tiny)("Hello", return_tensors="pt").input_ids
    first = next(model.stream_tokens(prompt, max_new_tokens=1))
    ending = copy_of(tiny, tmp_path, eos_token_id=int(first[0]))
    assert good("generate", "Hello", "--model", ending, "--greedy") == "Hello\n"
    assert good("generate", "Hello", "--model", ending, "--greedy", "--stream") == "Hello\n"


@needs_pt
def test_the_context_bounds_the_text(tiny: Path) -> None:
    assert good("generate", "x" * 63, "--model", tiny, "--max-new-tokens", "0") == "x" * 63 + "\n"
    good("generate", "x" * 63, "--model", tiny)
    message = refusal("generate", "x" * 64, "--model", tiny)
    assert message == "PROMPT: 64 tokens leave no room, for the model can read 64; shorten it"
    message = refusal("generate", "x" * 60, "--model", tiny, "--max-new-tokens", "5")
    assert "60 prompt tokens and 5 new ones are more than n_positions 64" in message


@needs_pt
def test_a_process_pipes_clean_text(tiny: Path) -> None:
    done = process("generate", "--model", tiny, stdin=b"Hello\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == good("generate", "Hello", "--model", tiny)


@needs_pt
def test_an_output_that_lacks_a_character_gets_a_mark(tiny: Path) -> None:
    done = process("generate", "日", "--model", tiny, "--max-new-tokens", "0", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?\n", b"")


@needs_pt
def test_a_closed_pipe_is_quiet(tiny: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "gpt2_multi", "generate", "Hello", "--stream", "--model", str(tiny)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


@needs_pt
def test_progress_is_for_a_terminal_and_on_standard_error(tiny: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gpt2_multi", "generate", "Hello", "--model", str(tiny)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs) as child:
        text = child.communicate()[0]
    os.close(theirs)
    assert b"Generating" in os.read(ours, 10_000)
    os.close(ours)
    assert text.decode() == good("generate", "Hello", "--model", tiny)


def test_no_piece_splits_a_character(tiny: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(tiny)
    ids = tokenizer(CHARACTERS).input_ids
    assert len(ids) == 1 + 2 + 3 + 4
    config = GenerationConfig(eos_token_id=ids[-1])
    assert list(texts.decode(tokenizer, ids, GenerationConfig())) == list(CHARACTERS)
    assert "".join(texts.decode(tokenizer, ids[:-1], GenerationConfig())) == tokenizer.decode(ids[:-1])
    assert list(texts.decode(tokenizer, [ids[0], ids[-1], ids[0]], config)) == [CHARACTERS[0]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--top-p", "2"), "top_p: expected a number above 0, up to 1, found 2.0"),
        (
            ("--temperature", "0"),
            "temperature: expected a number from 1e-9 (for greedy choice: do_sample=False), found 0.0",
        ),
        (("--max-new-tokens", "-1"), "max_new_tokens: expected a whole number from 0"),
        (("--num-return-sequences", "0"), "num_return_sequences: expected a whole number from 1"),
    ],
)
def test_wrong_options(args: tuple[str, ...], message: str) -> None:
    assert refusal("generate", "Hello", *args).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--greedy", "--seed", "1"), "--greedy does not sample, so that --seed would change nothing; drop one"),
        (("--greedy", "--top-k", "1", "--top-p", "1"), "--greedy does not sample, so that --top-k, --top-p would"),
        (("--stream", "--num-return-sequences", "2"), "--stream prints one text; leave out --num-return-sequences"),
        (("--backend", "mx"), "Invalid value for '--backend': 'mx' is not"),
        (("--seed", "x"), "Invalid value for '--seed': 'x' is not a valid integer"),
        (("--tempature", "1"), "No such option '--tempature'"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], message: str) -> None:
    assert refusal("generate", "Hello", *args, code=2).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--stream", "--num-beams", "2"),
            "--stream prints tokens as they come, which beams do not; leave out --num-b",
        ),
        (("--interactive", "--num-return-sequences", "2"), "--interactive prints one text; leave out"),
        (("--interactive", "--stream"), "--interactive prints a text while it is made anyway; leave out --stream"),
        (("--greedy", "--min-p", "0.1"), "--greedy does not sample, so that --min-p would change nothing; drop one"),
        (("--output", "a.jsonl"), "--output is for --prompts, which is not there; give both, or none"),
        (("--batch-size", "2"), "--batch-size is for --prompts, which is not there"),
        (("--prompts", "a.txt"), "--prompts needs --output, the file that the texts go to; give it too"),
        (("--prompts", "a.txt", "--output", "b"), "--prompts has the prompts, and writes to a file; leave out PROMPT"),
    ],
)
def test_ways_that_do_not_go_together(args: tuple[str, ...], message: str) -> None:
    assert refusal("generate", "Hello", *args, code=2).startswith(message)


@needs_pt
def test_a_text_ends_before_a_stop_string() -> None:
    args = ("generate", "ROMEO:", "--seed", "1", "--max-new-tokens", "40")
    new = good(*args).removeprefix("ROMEO:").removesuffix("\n")
    stops = [new[20:23], new[40:42]]
    cut = min(new.find(stop) for stop in stops)
    given = [part for stop in stops for part in ("--stop", stop)]
    assert good(*args, *given) == good(*args, *given, "--stream") == f"ROMEO:{new[:cut]}\n"
    assert f"========\nROMEO:{new[:cut]}\n========" in good(*args, *given, "--num-return-sequences", "2")
    assert good(*args, "--stop", "ROMEO:") == f"ROMEO:{new}\n"  # which the prompt has, and the rest has not


@given(st.lists(st.text("ab", max_size=5), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_stands_before_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    found = list(texts.before_stops(pieces, stops))
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    seen = next((s for s in accumulate(pieces) if ends and len(s) >= ends[0]), text)  # the piece in which one ends
    cuts = [at for stop in stops if (at := seen.find(stop)) >= 0]
    assert "".join(found) == seen[: min(cuts, default=len(seen))] and "" not in found


@needs_pt
def test_beams_and_rules_are_those_of_the_model(tiny: Path) -> None:
    pt = pytest.importorskip("gpt2_multi.pt")
    tokenizer, model = GPT2Tokenizer.from_pretrained(tiny), pt.GPT2LMHeadModel.from_pretrained(tiny)
    common = {"tokenizer": tokenizer, "max_new_tokens": 9}
    args = ("generate", "Hello", "--model", tiny, "--max-new-tokens", "9")
    beams = model.generate("Hello", num_beams=3, num_return_sequences=2, **common)
    found = good(*args, "--num-beams", "3", "--greedy", "--num-return-sequences", "2")
    assert found == "".join(f"======== {i} of 2 ========\n{text}\n" for i, text in enumerate(beams, 1))
    chosen = model.generate("Hello", do_sample=True, min_p=0.2, seed=0, **common)
    assert good(*args, "--min-p", "0.2", "--device", "cpu") == chosen + "\n" != good(*args)
    sentence = refusal(*args, "--device", "cuda:7")
    assert sentence.startswith("device: PyTorch has ") and "found 'cuda:7'; choose one of these" in sentence
