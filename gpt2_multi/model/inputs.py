"""What a model call may be given, in one sentence each: the same words whichever framework finds the fault."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from gpt2_multi.errors import InputError

Shape = Sequence[int]


def check_names(call: str, given: Sequence[str], known: Sequence[str], kind: str = "argument") -> None:
    """An argument that a call does not have is a TypeError, with the nearest name; so is one that is there twice."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise TypeError(f"{call} has no {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if given.count(name) > 1:
            raise TypeError(f"{call}: {name} is given twice; give it once")


def check_count(call: str, given: int, known: int) -> None:
    """More arguments without names than a call has are a TypeError."""
    if given > known:
        raise TypeError(f"{call}: expected at most {known} arguments in order, found {given}; give them by name")


def check_given(input_ids: object, inputs_embeds: object) -> None:
    """Exactly one of the two inputs has to be there."""
    if (input_ids is None) == (inputs_embeds is None):
        found = "neither" if input_ids is None else "both"
        raise InputError(f"expected one of input_ids and inputs_embeds, found {found}; give one of them")


def check_shape(name: str, found: Shape, expected: Sequence[int | None]) -> None:
    """`found` has to be `expected`, in which None stands for any length and 1 is broadcast."""
    fits = len(found) == len(expected) and all(e in (None, f) for f, e in zip(found, expected, strict=True))
    if not fits:
        shape = str(tuple("any" if e is None else e for e in expected)).replace("'", "")
        raise InputError(f"{name}: expected shape {shape}, found {tuple(found)}; batch and length must fit the input")


def check_mask(found: Shape, batch: int, heads: int, length: int, keys: int) -> None:
    """An attention mask is (batch, keys), or broadcasts to (batch, heads, length, keys)."""
    if len(found) == 4:
        sizes = zip(found, (batch, heads, length, keys), strict=True)
        if all(f in (1, e) for f, e in sizes) and found[-1] == keys:
            return
    elif tuple(found) == (batch, keys):
        return
    past = f" ({keys - length} of them cached)" if keys > length else ""
    raise InputError(
        f"attention_mask: expected shape ({batch}, {keys}){past} or one that broadcasts to "
        f"({batch}, {heads}, {length}, {keys}), found {tuple(found)}; it needs a column for every token"
    )


def check_integers(name: str, found: object, fits: bool) -> None:
    """Ids are integers."""
    if not fits:
        raise InputError(f"{name}: expected integers, found {found}; ids are int32 or int64, from the tokenizer")


def check_head_mask(found: Shape, sizes: Shape) -> None:
    """A head mask is (heads,), (layers, heads), or broadcasts to `sizes`: (layers, batch, heads, length, keys)."""
    layers, heads = sizes[0], sizes[2]
    if len(found) == 5 and found[0] == layers and all(f in (1, s) for f, s in zip(found, sizes, strict=True)):
        return
    if tuple(found) not in ((heads,), (layers, heads)):
        raise InputError(f"head_mask: expected shape ({layers}, {heads}) or ({heads},), found {tuple(found)}")


def check_cache(found_batch: int, found_dtype: str, batch: int, dtype: str) -> None:
    """A cache belongs to one batch, and to one dtype."""
    if (found_batch, found_dtype) != (batch, dtype):
        raise InputError(
            f"past_key_values: made for {found_batch} rows in {found_dtype}, but the input has {batch} rows and the "
            f"model computes in {dtype}; make a new cache"
        )


def check_context(prompt: int, new: int, n_positions: int) -> None:
    """A prompt and what is to follow have to fit the table of positions."""
    if prompt + new > n_positions:
        raise InputError(
            f"{prompt} prompt tokens and {new} new ones are more than n_positions {n_positions}, the longest text that "
            "this model can read; lower max_new_tokens or truncate the prompt"
        )


def check_kept(logits_to_keep: int) -> None:
    """How many positions get logits: 0 means all."""
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise InputError(f"logits_to_keep: expected a whole number from 0, found {logits_to_keep!r}")


def check_size(name: str, value: Any, least: int = 0) -> None:
    """A number of things is a whole number."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        raise InputError(f"{name}: expected a whole number from {least}, found {value!r}")


def check_ids(name: str, low: int, high: int, vocab_size: int) -> None:
    """Every id has to lie in the vocabulary; `low` and `high` are the extremes."""
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InputError(
            f"{name}: the id {bad} is outside the vocabulary (0 to {vocab_size - 1}); use this model's "
            "tokenizer, or resize_token_embeddings"
        )


def check_positions(low: int, high: int, n_positions: int) -> None:
    """Every position has to lie in the table of positions; `low` and `high` are the extremes."""
    if low < 0:
        raise InputError(f"position_ids: {low} is negative; positions count from 0")
    if high >= n_positions:
        raise InputError(
            f"{high + 1} tokens are more than n_positions {n_positions}, the longest text that this model can read; "
            "truncate the input"
        )


def check_recomputed(past: object) -> None:
    """Gradient checkpointing runs a block twice, and a cache would be extended twice."""
    if past is not None:
        raise InputError("past_key_values: cannot be used while gradient checkpointing trains; disable one of the two")


def check_room(new: int, past: int, capacity: int) -> None:
    """A preallocated cache has to have room for the new tokens."""
    if past + new > capacity:
        raise InputError(
            f"past_key_values: {past} cached and {new} new tokens are more than the cache's max_length {capacity}; "
            "reset() it, or ask init_cache for a longer one"
        )


def check_pooling(batch: int, can_find_end: bool) -> None:
    """Sequence classification has to know where each row of a batch ends."""
    if batch > 1 and not can_find_end:
        raise InputError(
            f"cannot tell where each of {batch} rows ends: give attention_mask, or set model.config.pad_token_id "
            "and give input_ids"
        )


def check_pooled(length: int | None) -> None:
    """What looks at the last token of a text needs one; None is a length that is not known yet."""
    if length == 0:
        raise InputError("input_ids: a text has no token to look at; give at least one, such as the bos_token_id")


def check_encoder(add_cross_attention: bool) -> None:
    """Encoder states need blocks that look at them."""
    if not add_cross_attention:
        raise InputError(
            "encoder_hidden_states: this model has no cross-attention; set add_cross_attention in its config"
        )


def check_choices(found: Shape, rank: int) -> None:
    """Double heads take a dimension of choices."""
    if len(found) != rank:
        raise InputError(
            f"expected {rank} dimensions (batch, choices, length{', n_embd' if rank == 4 else ''}), found shape "
            f"{tuple(found)}; for one choice add a dimension of length 1"
        )


def check_prompts(least: int) -> None:
    """Generation continues a text, so every prompt needs a token; `least` is the shortest row's count."""
    if least < 1:
        raise InputError("input_ids: a prompt has no token; give at least one, such as the bos_token_id")


def check_labels(low: int, high: int, classes: int) -> None:
    """A label is a class, or -100; `low` and `high` are the extremes."""
    if high >= classes or (low < 0 and low != -100):
        raise InputError(f"labels: {high if high >= classes else low} is not a class (0 to {classes - 1}, or -100)")


def check_choice_tokens(low: int, high: int, length: int) -> None:
    """A choice is scored at one of its tokens; `low` and `high` are the extremes."""
    if low < 0 or high >= length:
        bad = low if low < 0 else high
        raise InputError(f"mc_token_ids: the index {bad} is outside the text (0 to {length - 1})")


def check_seed(seed: Any) -> None:
    """A seed that every generator takes."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 2**32:
        raise InputError(f"seed: expected a whole number from 0 to 2**32 - 1, found {seed!r}")


def check_tokenizer(tokenizer: object) -> None:
    """What turns ids into the bytes of texts is a tokenizer of this library."""
    if not hasattr(tokenizer, "decode_bytes"):
        found = f"the text {tokenizer!r}" if isinstance(tokenizer, str) else type(tokenizer).__name__
        raise InputError(f"tokenizer: expected a GPT2Tokenizer, found {found}; use GPT2Tokenizer.from_pretrained")


def check_truth(name: str, value: object) -> None:
    """A switch is on or off."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected True or False, found {value!r}")


def check_text(name: str, text: object) -> None:
    """A text is a string."""
    if not isinstance(text, str):
        raise InputError(f"{name}: expected a text, found {type(text).__name__}; give a string")


def check_text_input(has_mask: bool, tokenizer: object) -> None:
    """Texts need a tokenizer, which makes their mask too."""
    if tokenizer is None:
        raise InputError("input_ids: found text, which needs a tokenizer; give tokenizer=, or ids")
    check_tokenizer(tokenizer)
    if has_mask:
        raise InputError("attention_mask: is made by the tokenizer where texts are given; leave it out, or give ids")


def check_start(start: int | None, vocab_size: int) -> None:
    """A text without a token has to begin with one."""
    if start is None or not 0 <= start < vocab_size:
        raise InputError(f"the prompt is empty, and bos_token_id {start} of the model starts no text; give a prompt")


def check_scoring(are_texts: bool, stride: int | None, batch_size: int, n_positions: int) -> None:
    """What is scored is text, in windows that leave no token out."""
    if not are_texts:
        raise InputError("texts: expected a text or a list of texts, found something else")
    check_size("batch_size", batch_size, 1)
    if n_positions < 2:
        raise InputError(f"n_positions: {n_positions} leaves a token nothing to be scored after; use another model")
    if stride is not None:
        check_size("stride", stride, 1)
        if stride >= n_positions:
            raise InputError(f"stride: expected less than n_positions {n_positions}, found {stride}; lower it")
