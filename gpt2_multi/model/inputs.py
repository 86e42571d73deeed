"""What a model call may be given, in one sentence each: the same words whichever framework finds the fault.

A check looks at facts. A framework says what it knows of an array, and that is all that it has to say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpt2_multi.errors import InputError, described, nearest
from gpt2_multi.model.config import GPT2Config

Shape = Sequence[int | None]  # None: not known yet
OLD_NAMES = {"past": "past_key_values", "lm_labels": "labels"}  # of 2019 and 2020 -> today's

# What transformers' DataCollatorWithFlattening gives beside position_ids that begin again with each document.
PACKED = frozenset(["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"])


class Facts(NamedTuple):
    """What is known of an array: `kind` is "integers", "floats", "strings" or "others".

    `values` gives the array to NumPy, or None where there are no values yet; it is called only where a check needs it,
    since it waits for the device.
    """

    shape: tuple[int | None, ...]
    dtype: str
    kind: str
    values: Callable[[], Any]

    @classmethod
    def of(cls, x: np.ndarray[Any, Any]) -> Facts:
        """What is known of an array of NumPy."""
        kind = {"i": "integers", "u": "integers", "f": "floats", "U": "strings", "S": "strings"}
        return cls(x.shape, x.dtype.name, kind.get(x.dtype.kind, "others"), lambda: x)


def extremes(x: Facts) -> tuple[int, int] | None:
    """The least and the greatest of some integers; (0, 0) of none, and None where they are not known."""
    if (values := x.values()) is None:
        return None
    return (int(values.min()), int(values.max())) if values.size else (0, 0)


def check_names(call: str, given: Sequence[str], known: Sequence[str], kind: str = "argument") -> None:
    """An argument that a call does not have is a TypeError, with the nearest name; so is one that is there twice."""
    for name in given:
        if name not in known:
            raise TypeError(f"{call} has no {kind} {name!r}{nearest(str(name), known)}")
        if given.count(name) > 1:
            raise TypeError(f"{call}: {name} is given twice; give it once")


def renamed(call: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments under today's names; one that is there under both is a TypeError."""
    for old, name in OLD_NAMES.items():
        if given.get(old) is not None and given.get(name) is not None:
            raise TypeError(f"{call}: {old} is {name} under its old name; give one of the two")
    new = {OLD_NAMES[name]: value for name, value in given.items() if name in OLD_NAMES}
    return {name: value for name, value in given.items() if name not in OLD_NAMES} | new


def check_cache_position(places: Facts, before: int, new: int) -> None:
    """Places (T,) of new tokens are those after what the cache has, as where none are given."""
    check_shape("cache_position", places.shape, (new,))
    values = places.values()
    if values is not None and (values != np.arange(before, before + new)).any():
        raise InputError(
            f"cache_position: expected {before} to {before + new - 1}, since tokens are written after those in the "
            f"cache, found {values.tolist()}; leave it out, and give position_ids for positions of your own"
        )


def check_count(call: str, given: int, known: int) -> None:
    """More arguments without names than a call has are a TypeError."""
    if given > known:
        raise TypeError(f"{call}: expected at most {known} arguments in order, found {given}; give them by name")


def check_given(input_ids: object, inputs_embeds: object) -> None:
    """Exactly one of the two inputs has to be there."""
    if (input_ids is None) == (inputs_embeds is None):
        found = "neither" if input_ids is None else "both"
        raise InputError(f"expected one of input_ids and inputs_embeds, found {found}; give one of them")


def check_source(config: GPT2Config, given: Mapping[str, Facts]) -> Facts:
    """The ids (B, T) or the embeddings (B, T, E), whichever is given."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    check_given(ids, embeds)
    if ids is not None:
        check_shape("input_ids", ids.shape, (None, None))
        return ids
    assert embeds is not None
    check_shape("inputs_embeds", embeds.shape, (None, None, config.n_embd))
    if embeds.kind != "floats":
        raise InputError(f"inputs_embeds: expected floats, found {embeds.dtype}; ids are input_ids")
    return embeds


def check_call(
    config: GPT2Config,
    given: Mapping[str, Facts],
    tables: tuple[int, int],
    past: int | None,
    keys: int | None,
    values: bool = True,
    are_apart: bool = False,
) -> None:
    """Every input of the body has to fit the configuration and the others.

    `tables` are the rows of the embeddings of tokens and of positions, `past` the tokens in the cache, `keys` the
    columns of a mask; None is not known yet. Without `values` shapes are looked at alone: nothing waits for the device.
    Where `are_apart`, positions that begin again without a mask are those of documents that do not see each other.
    """
    batch, length = check_source(config, given).shape[:2]
    _check_beside(config, given, batch, length, keys)
    check_states(config, batch, given)
    if values:
        _check_values(given, tables, None if past is None or length is None else past + length)
        if "position_ids" in given and not (are_apart and "attention_mask" not in given):
            warn_of_documents(given["position_ids"], given.get("attention_mask"))


def _check_beside(
    config: GPT2Config, given: Mapping[str, Facts], batch: int | None, length: int | None, keys: int | None
) -> None:
    for name in ("attention_mask", "head_mask"):
        check_numbers(name, given)
    if "attention_mask" in given:
        check_mask(given["attention_mask"].shape, batch, config.n_head, length, keys)
    if "token_type_ids" in given:
        check_shape("token_type_ids", given["token_type_ids"].shape, (batch, length))
    if "position_ids" in given:
        shape = given["position_ids"].shape
        check_shape("position_ids", shape, (1 if shape[:1] == (1,) else batch, length))
    if "head_mask" in given:
        check_head_mask(given["head_mask"].shape, (config.n_layer, batch, config.n_head, length, keys))


def check_states(config: GPT2Config, batch: int | None, given: Mapping[str, Facts]) -> None:
    """An encoder's states are (B, encoder length, E), their mask (B, encoder length)."""
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        check_numbers(name, given)
    if states is not None:
        check_encoder(config.add_cross_attention)
        check_shape("encoder_hidden_states", states.shape, (batch, None, config.n_embd))
    if mask is not None:
        check_shape("encoder_attention_mask", mask.shape, (batch, None) if states is None else states.shape[:2])


def _check_values(given: Mapping[str, Facts], tables: tuple[int, int], keys: int | None) -> None:
    """Ids lie in the vocabulary, and positions in their table: those given, or those that count unmasked keys."""
    for name in ("input_ids", "token_type_ids"):
        if name in given:
            check_ids(name, given[name], tables[0])
    if "position_ids" in given:
        check_integers("position_ids", given["position_ids"])
        check_positions(*(extremes(given["position_ids"]) or (0, 0)), tables[1])
    elif keys is not None and keys > tables[1]:  # or no mask can make them too many
        check_positions(0, _counted(given.get("attention_mask"), keys) - 1, tables[1])


def warn_of_documents(places: Facts, mask: Facts | None = None) -> None:
    """Positions that begin again look like those of several documents, which see each other all the same."""
    found, keep = places.values(), None if mask is None else mask.values()
    if found is None or found.shape[-1] < 2 or (mask is not None and (keep is None or len(mask.shape) != 2)):
        return
    keep = np.ones_like(found, bool) if keep is None else keep[:, -found.shape[-1] :] != 0
    found = np.broadcast_to(found, keep.shape)
    first = np.take_along_axis(found, keep.argmax(-1)[:, None], -1)
    breaks = (np.diff(found) != 1) & keep[:, 1:] & keep[:, :-1]
    if (breaks.any(-1) & (~breaks | (found[:, 1:] == first)).all(-1)).any():  # others are no documents
        warnings.warn(
            "position_ids: begin again within a row, whose tokens see all before them; to keep documents apart give an "
            "attention_mask of rank 4 or, in PyTorch, no mask and use_cache=False",
            stacklevel=2,
        )


def check_alone(position_ids: object, past: object, use_cache: bool | None) -> None:
    """Documents in a row have positions of their own, and no cache."""
    if position_ids is None:
        raise InputError(
            "position_ids: expected beside where documents begin, found None; give those that begin again with each, "
            "as DataCollatorWithFlattening does with return_position_ids=True"
        )
    if past is not None or use_cache:
        raise InputError("use_cache: documents in a row have no cache; leave it and past_key_values out")


def check_documents(begins: Facts, told: Mapping[str, Facts]) -> None:
    """What says where documents begin has to say what the positions (B, T) do, of which `begins` has a 1 at each."""
    check_shape("position_ids", begins.shape, (None, None))
    if (values := begins.values()) is None:
        return
    values = values.copy()
    values[:, :1] = 1
    ends = [*np.flatnonzero(values), values.size]
    expected: dict[str, Any] = dict.fromkeys(["cu_seq_lens_q", "cu_seq_lens_k"], ends)
    expected |= dict.fromkeys(["max_length_q", "max_length_k"], int(np.diff(ends).max(initial=0)))
    for name, facts in told.items():
        found = facts.values()
        if name == "seq_idx":
            check_shape(name, facts.shape, begins.shape)
            fits = found is None or bool(((np.diff(found) != 0) == values[:, 1:]).all())
        elif name.startswith("cu"):
            fits = found is None or [*dict.fromkeys(found.tolist())] == ends
        else:
            fits = found is None or int(found) == expected[name]
        if not fits:
            wanted = "" if name == "seq_idx" else f"expected {np.array(expected[name]).tolist()} by position_ids, "
            raise InputError(
                f"{name}: {wanted}found {found.tolist()}; documents begin where positions do not go on by one"
            )


def _counted(mask: Facts | None, keys: int) -> int:
    """The most keys that a row of the mask keeps, which are so many without one; 0 where its values are not known."""
    if mask is None or len(mask.shape) != 2:
        return keys
    values = mask.values()
    return 0 if values is None else int((values[:, :keys] != 0).sum(-1).max(initial=0))


def _fits(found: int | None, expected: int | None) -> bool:
    return found is None or expected is None or found == expected


def check_shape(name: str, found: Shape, expected: Shape) -> None:
    """`found` has to be `expected`, in which None stands for any length; so does one of `found` that is not known."""
    if len(found) != len(expected) or not all(map(_fits, found, expected)):
        shape = str(tuple("any" if e is None else e for e in expected)).replace("'", "")
        raise InputError(f"{name}: expected shape {shape}, found {tuple(found)}; batch and length must fit the input")


def check_mask(found: Shape, batch: int | None, heads: int, length: int | None, keys: int | None) -> None:
    """An attention mask is (batch, keys), or broadcasts to (batch, heads, length, keys)."""
    if len(found) == 4:
        if _broadcasts(found, (batch, heads, length, keys)) and _fits(found[-1], keys):
            return
    elif len(found) == 2 and all(map(_fits, found, (batch, keys))):
        return
    past = f" ({keys - length} of them cached)" if keys and length and keys > length else ""
    raise InputError(
        f"attention_mask: expected shape ({batch}, {keys}){past} or one that broadcasts to "
        f"({batch}, {heads}, {length}, {keys}), found {tuple(found)}; it needs a column for every token"
    )


def _broadcasts(found: Shape, sizes: Shape) -> bool:
    return all(f == 1 or _fits(f, size) for f, size in zip(found, sizes, strict=True))


def check_integers(name: str, x: Facts) -> None:
    """Ids are integers."""
    if x.kind != "integers":
        raise InputError(f"{name}: expected integers, found {x.dtype}; ids are int32 or int64, from the tokenizer")


def check_numbers(name: str, given: Mapping[str, Facts]) -> None:
    """What is cast has to be numbers or booleans."""
    if name in given and given[name].kind == "strings":
        raise InputError(f"{name}: expected numbers, found strings; the tokenizer makes them of texts")


def check_head_mask(found: Shape, sizes: Shape) -> None:
    """A head mask is (heads,), (layers, heads), or broadcasts to `sizes`: (layers, batch, heads, length, keys)."""
    layers, heads = sizes[0], sizes[2]
    if len(found) == 5 and found[0] == layers and _broadcasts(found, sizes):
        return
    if tuple(found) not in ((heads,), (layers, heads)):
        raise InputError(f"head_mask: expected shape ({layers}, {heads}) or ({heads},), found {tuple(found)}")


def check_past(past: object, fits: bool, layers: int) -> None:
    """A cache is what a call returned."""
    if not fits:
        raise InputError(
            f"past_key_values: expected what a call returned, a (key, value) pair for each of {layers} layers, "
            f"found {type(past).__name__}; pass it back as it is, or use init_cache"
        )


def check_cache(found_batch: int | None, found_dtype: str, batch: int | None, dtype: str) -> None:
    """A cache belongs to one batch, and to one dtype."""
    if not _fits(found_batch, batch) or found_dtype != dtype:
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


def new_vocabulary(wanted: int | None, now: int, multiple: int | None) -> int | None:
    """How many ids a vocabulary is to have: so many, rounded up to a multiple where one is given; None leaves it."""
    if multiple is None:
        return wanted
    check_size("pad_to_multiple_of", multiple, 1)
    return -(-(now if wanted is None else wanted) // multiple) * multiple


def check_ids(name: str, x: Facts, vocab_size: int) -> None:
    """Ids are integers, and every one has to lie in the vocabulary."""
    check_integers(name, x)
    check_vocabulary(name, *(extremes(x) or (0, 0)), vocab_size)


def check_vocabulary(name: str, low: int, high: int, vocab_size: int) -> None:
    """Ids lie in the vocabulary; `low` and `high` are the extremes."""
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


def check_recomputed(past: object, use_cache: bool | None) -> bool:
    """Gradient checkpointing runs a block twice, and a cache would be extended twice: so there is none."""
    if past is not None:
        raise InputError("past_key_values: cannot be used while gradient checkpointing trains; disable one of the two")
    if use_cache:
        warnings.warn("use_cache is off: blocks recomputed by checkpointing cannot cache", stacklevel=5)
    return False


def check_room(new: int | None, past: int | None, capacity: int | None) -> None:
    """A preallocated cache has to have room for the new tokens; None is not known yet."""
    if None not in (new, past, capacity) and past + new > capacity:  # type: ignore[operator]
        raise InputError(
            f"past_key_values: {past} cached and {new} new tokens are more than the cache's max_length {capacity}; "
            "reset() it, or ask init_cache for a longer one"
        )


def check_crop(length: int) -> None:
    """A cache is cut to a length, or by one; 0 would be none of it in transformers 4, and all of it in 5."""
    if not length:
        raise InputError(
            "crop: expected a length to keep, or a negative number of tokens to drop, found 0; leave it out to keep "
            "all tokens, or reset() the cache to forget them"
        )


def check_pooling(batch: int, can_find_end: bool) -> None:
    """Sequence classification has to know where each row of a batch ends."""
    if not can_find_end and batch > 1:
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


def check_skipped(skip_logits: object) -> None:
    """Without labels nothing but logits is wanted of a head."""
    if skip_logits:
        raise InputError("skip_logits: expected labels beside it, found none; call the body for hidden states alone")


def check_labels(x: Facts, logits: Shape) -> None:
    """Labels (...) have to fit logits of shape (..., K), and be classes or -100."""
    check_shape("labels", x.shape, logits[:-1])
    check_integers("labels", x)
    check_classes(x, logits[-1] or 0)


def check_classes(x: Facts, classes: int) -> None:
    """A label is a class, or -100."""
    low, high = extremes(x) or (0, 0)
    if high >= classes or (low < 0 and low != -100):
        raise InputError(f"labels: {high if high >= classes else low} is not a class (0 to {classes - 1}, or -100)")


def check_choice_tokens(x: Facts, choices: Shape) -> None:
    """A choice is scored at one of its tokens: (B, C) indices into (B, C, T) ids."""
    check_shape("mc_token_ids", x.shape, choices[:2])
    check_integers("mc_token_ids", x)
    (low, high), length = extremes(x) or (0, 0), choices[2]
    if length is not None and (low < 0 or high >= length):
        bad = low if low < 0 else high
        raise InputError(f"mc_token_ids: the index {bad} is outside the text (0 to {length - 1})")


def check_seed(seed: Any) -> None:
    """A seed that every generator takes."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 2**32:
        raise InputError(f"seed: expected a whole number from 0 to 2**32 - 1, found {seed!r}")


def check_tokenizer(tokenizer: object) -> None:
    """What makes ids of texts, and texts of ids, is a tokenizer of this library, or of another."""
    if not hasattr(tokenizer, "decode_bytes") and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        found = f"the text {tokenizer!r}" if isinstance(tokenizer, str) else described(tokenizer)
        raise InputError(
            f"tokenizer: expected a GPT2Tokenizer, or another that is called with a text and decodes, found {found}; "
            "use GPT2Tokenizer.from_pretrained"
        )


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


def check_begin(start: int | None, vocab_size: int) -> None:
    """Generation without an input begins with the token that begins a text."""
    if start is None or not 0 <= start < vocab_size:
        raise InputError(
            f"input_ids: expected ids or texts, found None; bos_token_id {start} begins no text, so give ids, or set it"
        )


def check_continued(length: int, past: int, are_aligned: bool) -> None:
    """What goes on from a cache has tokens that are not in it, and each row's last one stands at the end."""
    if length <= past:
        raise InputError(
            f"past_key_values: holds {past} tokens, and input_ids, which are the whole text, only {length}; give those "
            "in the cache and at least one more"
        )
    if not are_aligned:
        raise InputError(
            "attention_mask: hides the last token of a row, after which a cache cannot go on; pad on the left"
        )


def check_assistant(assistant: Any, vocab_size: int) -> None:
    """Whoever guesses tokens needs the same ones."""
    if not hasattr(assistant, "config") or not hasattr(assistant, "generate"):
        found = type(assistant).__name__
        raise InputError(f"assistant_model: expected a model that generates, found {found}; give a GPT2LMHeadModel")
    if assistant.config.vocab_size != vocab_size:
        raise InputError(
            f"assistant_model: has {assistant.config.vocab_size} tokens where the model has {vocab_size}; give one of "
            "the same tokenizer"
        )


def check_together(loops: int) -> None:
    """What is streamed to one place is made at once."""
    if loops > 1:
        raise InputError(f"streamer: {loops} texts are made one after the other here; give one prompt, or leave it out")


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
