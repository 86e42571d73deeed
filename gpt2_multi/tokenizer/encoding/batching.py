"""From token lists to a batch: what texts a call got, truncation and windows, and padding."""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from gpt2_multi.errors import TokenizerError

TRUNCATIONS = {False: "", None: "", "do_not_truncate": "", True: "longest_first"} | {
    name: name for name in ("longest_first", "only_first", "only_second")
}
PADDINGS = {False: "", "do_not_pad": "", True: "longest", "longest": "longest", "max_length": "max_length"}
# What stands for padding in each list; a list that is not named here keeps its length.
FILLERS: dict[str, Any] = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}


def choose(name: str, value: Any, known: Mapping[Any, str]) -> str:
    """The meaning of an argument's value, which may be an enumeration's.

    Raises:
        TokenizerError: the value is not known.
    """
    try:
        return known[value.value if isinstance(value, Enum) else value]
    except (KeyError, TypeError):
        raise TokenizerError(f"{name}: expected one of {list(known)}, found {value!r}") from None


def as_today(padding: Any, truncation: Any, max_length: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Padding and truncation of a call that may have them under their names of 2019, which are taken out of `given`."""
    strategy, pads = given.pop("truncation_strategy", None), given.pop("pad_to_max_length", False)
    if pads and padding is False:
        if truncation is None and max_length is not None:
            truncation = "longest_first"
        padding = "longest" if max_length is None else "max_length"
    return padding, strategy if truncation is None else truncation


def check_size(name: str, value: Any, least: int = 0) -> None:
    """Refuse a size that is not a whole number, or is too small."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise TokenizerError(f"{name}: expected a whole number of at least {least}, found {value!r}")


def truncate(sizes: Sequence[int], limit: int, strategy: str, stride: int | None, side: str) -> list[list[range]]:
    """Which tokens of one or two sequences stay, so that there are at most `limit`.

    Args:
        sizes: the sequences' lengths.
        limit: the most tokens that may stay, added ones not counted.
        strategy: "longest_first", "only_first" or "only_second"; "" for none.
        stride: None for one row; otherwise the rest follows in further rows that repeat so many tokens.
        side: "right" or "left", where tokens are taken away.

    Raises:
        TokenizerError: the sequence to be cut is too short for it, or the stride leaves no progress.
    """
    if not strategy or sum(sizes) <= limit:
        return [[range(size) for size in sizes]]
    if strategy == "only_second" and len(sizes) == 1:
        raise TokenizerError('truncation: "only_second" needs a text_pair, found none')
    if limit == 0 and stride is None:
        return [[range(0) for _ in sizes]]
    limits = _longest_first(sizes, limit) if strategy == "longest_first" else _only(sizes, limit, strategy)
    if stride is None:
        return [[_kept(size, most, side) for size, most in zip(sizes, limits, strict=True)]]
    if strategy == "longest_first" and len(sizes) == 2:
        raise TokenizerError(
            'truncation: windows over a pair need "only_first" or "only_second", found "longest_first"'
        )
    at = 1 if strategy == "only_second" else 0
    whole = [range(size) for size in sizes]
    return [[*whole[:at], part, *whole[at + 1 :]] for part in _windows(sizes[at], limits[at], stride, side)]


def _longest_first(sizes: Sequence[int], limit: int) -> list[int]:
    if len(sizes) == 1:
        return [limit]
    short = min(sizes)
    if short + max(short, limit - short) > limit:  # both must give way; the longer one keeps the odd token
        low, high = limit // 2, limit - limit // 2
    else:
        low, high = short, limit - short
    return [low, high] if sizes[0] <= sizes[1] else [high, low]


def _only(sizes: Sequence[int], limit: int, strategy: str) -> list[int]:
    at = 1 if strategy == "only_second" else 0
    keep = limit - (sum(sizes) - sizes[at])
    if keep < 0 or (keep == 0 and len(sizes) == 2):
        raise TokenizerError(
            f"max_length: {strategy!r} would have to cut {sum(sizes) - limit} tokens from a sequence of {sizes[at]}; "
            'raise max_length, or use truncation="longest_first"'
        )
    return [keep if index == at else size for index, size in enumerate(sizes)]


def _kept(size: int, most: int, side: str) -> range:
    return range(min(size, most)) if side == "right" else range(max(0, size - most), size)


def _windows(size: int, most: int, stride: int, side: str) -> Iterator[range]:
    if stride >= most:
        raise TokenizerError(f"stride: expected less than the {most} tokens of a window, found {stride}")
    start = 0
    while True:
        stop = min(start + most, size)
        yield range(start, stop) if side == "right" else range(size - stop, size - start)
        if stop == size:
            return
        start += most - stride


def as_batch(text: Any, text_pair: Any, split: bool) -> tuple[list[Any], list[Any] | None, bool]:
    """The texts and their pairs as lists, and whether they came as lists.

    Raises:
        TokenizerError: something is not a text, or there are not as many pairs as texts.
    """
    if text_pair is None and not split and _are_pairs(text):
        text, text_pair = ([pair[at] for pair in text] for at in (0, 1))
    texts, batched = _as_texts("text", text, split)
    if text_pair is None:
        return texts, None, batched
    pairs, paired = _as_texts("text_pair", text_pair, split)
    if paired != batched or len(texts) != len(pairs):
        raise TokenizerError(f"text_pair: expected one per text, found {len(pairs)} for {len(texts)}")
    return texts, pairs, batched


def _as_texts(name: str, value: Any, split: bool) -> tuple[list[Any], bool]:
    value = value.tolist() if hasattr(value, "tolist") else value
    value = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple) else value
    single = _is_words(value) and bool(value) if split else isinstance(value, str)
    texts = [value] if single else list(value) if isinstance(value, list | tuple) else [value]
    for at, item in enumerate(texts):
        if not (_is_words(item) if split else isinstance(item, str)):
            wanted = "a list of words" if split else "a str, or a list of them"
            where = "" if single else f" at {at}"
            raise TokenizerError(
                f"{name}: expected {wanted}, found {type(item).__name__}{where}; pairs go in text_pair"
            )
    return texts, not single


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_words(item) and len(item) == 2 for item in value)


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)


def merge_encodings(encoded: Any) -> tuple[dict[str, list[Any]], bool]:
    """One encoding, a batch or a list of encodings as lists of rows, and whether it was more than one.

    Raises:
        TokenizerError: there are no `input_ids`, or the encodings do not have the same entries.
    """
    if isinstance(encoded, Mapping):
        lists = {name: _rows(value) for name, value in encoded.items()}
        batched = bool(lists.get("input_ids")) and isinstance(lists["input_ids"][0], list)
        lists = lists if batched else {name: [value] for name, value in lists.items()}
    else:
        names = list(encoded[0]) if encoded else ["input_ids"]
        if any(set(item) != set(names) for item in encoded):
            raise TokenizerError(f"encoded_inputs: expected the entries {names} in each encoding, found others in some")
        lists, batched = {name: [_rows(item[name]) for item in encoded] for name in names}, True
    if "input_ids" not in lists:
        raise TokenizerError(f"encoded_inputs: expected input_ids among the entries, found {list(lists)}")
    return lists, batched


def _rows(value: Any) -> Any:
    if hasattr(value, "tolist") or hasattr(value, "numpy"):
        return value.tolist() if hasattr(value, "tolist") else value.numpy().tolist()
    return [_rows(item) for item in value] if isinstance(value, list) else value


def pad_rows(
    lists: dict[str, list[list[Any]]], width: int, side: str, pad_id: int, fillers: Mapping[str, Any] = FILLERS
) -> None:
    """Fill every known list to `width`, in place."""
    fillers = {"input_ids": pad_id, **fillers}
    for name in lists.keys() & fillers.keys():
        for at, row in enumerate(lists[name]):
            fill = [fillers[name]] * (width - len(row))
            lists[name][at] = row + fill if side == "right" else fill + row


def width_of(rows: Sequence[Sequence[Any]], padding: str, max_length: int | None, multiple: int | None) -> int:
    """The length to which rows are padded; with "max_length" a longer row stays as it is."""
    longest = max(map(len, rows), default=0)
    width = (max_length or 0) if padding == "max_length" else longest
    return -(-width // multiple) * multiple if multiple else width
