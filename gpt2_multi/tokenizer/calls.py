"""Calls of a tokenizer: texts to rows of ids, cut and filled up as the caller says."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from os import PathLike
from typing import Any

from gpt2_multi.errors import TokenizerError, described, nearest
from gpt2_multi.files import arguments
from gpt2_multi.tokenizer.encoding import BatchEncoding
from gpt2_multi.tokenizer.encoding.batching import (
    PADDINGS,
    TRUNCATIONS,
    as_batch,
    as_today,
    check_size,
    choose,
    merge_encodings,
    pad_rows,
    width_of,
)
from gpt2_multi.tokenizer.encoding.reading import Reader, Texts
from gpt2_multi.tokenizer.encoding.results import to_arrays
from gpt2_multi.tokenizer.engine.bpe import BPE
from gpt2_multi.tokenizer.files import flagged
from gpt2_multi.tokenizer.special import Choice
from gpt2_multi.tokenizer.streaming.blocks import BlockEncoder, blocks
from gpt2_multi.tokenizer.streaming.workers import encoded
from gpt2_multi.tokenizer.tokens import TokenTable

SIDES = {"right": "right", "left": "left"}
LEFTOVERS = (*arguments.TOKENIZER_ONLY, "verbose")  # which mean nothing here, whatever they are
SWITCH = {False: "", True: "yes"}
LARGEST_WIDTH = 10**9  # transformers writes 10**30 where a tokenizer has no limit
NOTHING: frozenset[str] = frozenset()


class TextReader(TokenTable):
    """A table of tokens that is called with texts; what it is made of, and its settings, a class below gives it."""

    add_prefix_space: bool
    model_input_names: list[str]
    split_special_tokens: bool
    padding_side: str
    truncation_side: str
    _engine_in_python: BPE

    @property
    def _bpe(self) -> BPE:
        """The engine, with the unknown token that there is now."""
        if self._engine_in_python.unk_id != self._unk_id:
            self._engine_in_python = self._engine_of(self._engine_in_python.merges)
        return self._engine_in_python

    def _engine_of(self, merges: Sequence[tuple[str, str]]) -> BPE:
        how = {"ignore_merges": self._parts.ignore_merges, "use_regex": self._parts.steps.use_regex}
        return BPE(self._vocab, merges, self._unk_id, **how)

    @property
    def bpe_ranks(self) -> dict[tuple[str, str], int]:
        """The merges with their ranks, as transformers 4 has them."""
        return {pair: rank for rank, pair in enumerate(self._engine_in_python.merges)}

    @property
    def _unk_id(self) -> int | None:
        """What stands for a byte that the vocabulary does not hold."""
        named = self._parts.unk_token
        return self.unk_token_id if named is None else self.get_vocab().get(named)

    # --- one text ----------------------------------------------------------------------------------------------------

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """The ids of one text: the `input_ids` that calling the tokenizer gives, with the same options."""
        return self(text, text_pair, add_special_tokens, **options)["input_ids"]

    def tokenize(
        self,
        text: str,
        pair: str | None = None,
        add_special_tokens: bool = False,
        split_special_tokens: bool | None = None,
        allowed_special: Choice | None = None,
        disallowed_special: Choice = NOTHING,
        *,
        add_prefix_space: bool | None = None,
    ) -> list[str]:
        """The tokens of one text (and its pair), spelled as in vocab.json."""
        ids = self.encode(
            text,
            pair,
            add_special_tokens,
            add_prefix_space=add_prefix_space,
            split_special_tokens=split_special_tokens,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            truncation=False,
        )
        tokens: list[str] = self.convert_ids_to_tokens(ids)
        return tokens

    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text that holds no added token and no lone surrogate."""
        return self._bpe.encode(text)

    def _encode_to_array(self, text: str) -> Any:
        """The same as an array, where the engine makes one."""
        return self._encode_ordinary(text)

    @property
    def _is_compiled(self) -> bool:
        """Whether the engine runs beside Python, in threads."""
        return False

    # --- texts of any size -------------------------------------------------------------------------------------------

    def encode_stream(
        self,
        texts: Any,
        add_special_tokens: bool = True,
        split_special_tokens: bool | None = None,
        *,
        workers: int | None = None,
    ) -> Iterator[Any]:
        """The ids of texts of any size, one after the other, in arrays of half a million characters or so.

        Together they are what `encode` gives of each text, in uint16 where the vocabulary has no more ids, else in
        uint32. Files are read as they are encoded, and nothing is kept; texts that belong together, like lines of a
        file, are one text. Where a tokenizer.json normalizes texts, or cuts them in its own way, each is read whole.

        Args:
            texts: an iterable of texts, of paths (`pathlib.Path`) of files in UTF-8, or of open files; or one path or
                file. Each is a text of its own, between the tokens that are added to it.
            add_special_tokens: whether tokens are put around each text, as `add_eos_token` and the others say.
            split_special_tokens: as in a call of the tokenizer.
            workers: how many cores encode; by default all that there are, and one for GPT2TokenizerFast, whose engine
                is no quicker with more.

        Raises:
            TokenizerError: something is no text; or, when it is read: a file cannot be read, its bytes are not UTF-8,
                or it has no place to cut it at for a million characters.
        """
        check_size("workers", workers, least=1)
        for name in ("__call__", "encode"):
            if getattr(type(self), name) is not getattr(TextReader, name):
                raise TokenizerError(
                    f"encode_stream: reads texts as GPT2Tokenizer does, found a class with its own {name}; call that"
                )
        if isinstance(texts, str) or not isinstance(texts, Iterable | PathLike):
            raise TokenizerError(
                f"texts: expected several, found {described(texts)}; put a text in a list, and the name of a file in "
                "pathlib.Path"
            )
        control = self._choose_control(split_special_tokens, None)
        reader = replace(self._reader(*control, self.add_prefix_space), encode=self._encode_to_array)
        pieces = self._row() if add_special_tokens else flagged((), (), 1)
        dtype = "uint16" if max(self._spelled, default=0) < 1 << 16 else "uint32"
        found = blocks([texts] if isinstance(texts, PathLike) or hasattr(texts, "read") else texts, reader)
        return encoded(found, BlockEncoder(reader, pieces, dtype), self._is_compiled, workers)

    # --- calls -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        return_token_type_ids: bool | None = None,
        *,
        add_prefix_space: bool | None = None,
        split_special_tokens: bool | None = None,
        allowed_special: Choice | None = None,
        disallowed_special: Choice = NOTHING,
        **unknown: Any,
    ) -> BatchEncoding:
        """Encode a text or a list of texts, alone or in pairs.

        Args:
            text: a str, a list of them, or a list of pairs; with `is_split_into_words` a list of words or a list of
                such lists.
            text_pair: as `text`, to be encoded after it.
            add_special_tokens: whether tokens are put around the texts, if the tokenizer has some for them.
            padding: True or "longest" pads to the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first", "only_first", "only_second". None truncates where `max_length` is given
                and `padding` is not asked for.
            max_length: the limit in tokens, added ones included; without it that of `model_max_length`.
            stride: how many tokens a further window repeats, with `return_overflowing_tokens`.
            is_split_into_words: the text is a list of words; each gets a space before it.
            pad_to_multiple_of: pad to the next multiple.
            padding_side: "right" or "left" for this call.
            return_tensors: "np", "pt", "tf" or "jax"; without it lists.
            return_attention_mask: False leaves out the mask; by default as `model_input_names` says.
            return_overflowing_tokens: return what truncation cuts off as further rows, and
                `overflow_to_sample_mapping`, the text that each row belongs to.
            return_special_tokens_mask: mark tokens that were added.
            return_offsets_mapping: for each token the span of characters in the text that it stands for. A token that
                is a part of a character has the character's span.
            return_length: the number of tokens in each row, padding included.
            return_token_type_ids: 0 for the text, 1 for its pair; by default as `model_input_names` says.
            add_prefix_space, split_special_tokens: for this call; by default as the attributes say.
            allowed_special: the control tokens, or "all", that become one token where a text contains them; by default
                all that are not disallowed, and none with `split_special_tokens`.
            disallowed_special: the control tokens, or "all" others, that a text may not contain.

        Raises:
            TokenizerError: an argument is none of these, or the text contains a token that is not allowed.
            TypeError: an argument is not known.
        """
        padding, truncation = as_today(padding, truncation, max_length, unknown)
        refuse_unknown("a call of the tokenizer", unknown, TextReader.__call__)
        check_size("stride", stride)
        texts, pairs, batched = as_batch(text, text_pair, is_split_into_words)
        columns = [column for column in (texts, pairs) if column is not None]
        control = self._choose_control(split_special_tokens, allowed_special, disallowed_special)
        pieces = self._row(len(columns)) if add_special_tokens else flagged((), (), len(columns))
        limit = self._limit(truncation, max_length, padding)
        spaced = is_split_into_words or (self.add_prefix_space if add_prefix_space is None else add_prefix_space)
        overlap, reader = stride if return_overflowing_tokens else None, self._reader(*control, spaced)
        given = Texts(columns, reader, is_split_into_words, pieces, *limit, overlap, self.truncation_side)
        rows, owners = given.rows(return_offsets_mapping)
        wanted = {
            "input_ids": True,
            "token_type_ids": self._is_given("token_type_ids", return_token_type_ids),
            "attention_mask": self._is_given("attention_mask", return_attention_mask),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        lists = {name: [row.entry(name) for row in rows] for name, asked in wanted.items() if asked}
        self._pad_lists(lists, padding, max_length, pad_to_multiple_of, padding_side)
        encoding = BatchEncoding(lists)
        make = partial(given.encodings, lists["input_ids"], self._side(padding_side), self.convert_ids_to_tokens)
        encoding.trace(make, len(columns), return_offsets_mapping or is_split_into_words)
        if return_length:
            encoding["length"] = [len(ids) for ids in lists["input_ids"]]
        if return_overflowing_tokens:
            encoding["overflow_to_sample_mapping"] = owners
        if not batched and return_tensors is None and not return_overflowing_tokens:
            encoding.update({name: value[0] for name, value in encoding.items() if name != "length"})
        return encoding.convert_to_tensors(return_tensors)

    encode_plus = batch_encode_plus = __call__

    def _is_given(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else bool(asked)

    def _reader(self, allowed: frozenset[str], refused: frozenset[str], prefix_space: bool) -> Reader:
        """What reads the texts of a call."""
        found = allowed, refused, prefix_space, self._parts
        return Reader(self._control, self._bpe, self._encode_ordinary, self._bytes, *found)

    def _choose_control(
        self, split: bool | None, allowed: Choice | None, disallowed: Choice = NOTHING
    ) -> tuple[frozenset[str], frozenset[str]]:
        """The control tokens that become one token where a text contains them, and those that it may not contain."""
        refused = self._control.select("disallowed_special", disallowed)
        if allowed is None:
            is_split = choose("split_special_tokens", self.split_special_tokens if split is None else split, SWITCH)
            return (NOTHING if is_split else self._control.select("allowed_special", "all") - refused), refused
        chosen = self._control.select("allowed_special", allowed)
        return chosen, refused - chosen if disallowed == "all" else refused

    def _limit(self, truncation: Any, max_length: Any, padding: Any) -> tuple[int, str]:
        """The most tokens that a row may have, and how to get there ("" for not at all)."""
        check_size("max_length", max_length)
        strategy = choose("truncation", truncation, TRUNCATIONS)
        if truncation is None and max_length is not None and not choose("padding", padding, PADDINGS):
            strategy = "longest_first"
        return (self.model_max_length if max_length is None else max_length), strategy

    # --- padding -----------------------------------------------------------------------------------------------------

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad what calls returned: one encoding, a batch, or a list of encodings.

        Without a pad token the end token fills up; its mask is 0. Entries other than those of a call keep their length.

        Raises:
            TokenizerError: there are no `input_ids`, or an argument is not known.
        """
        lists, batched = merge_encodings(encoded_inputs)
        if "attention_mask" not in lists and self._is_given("attention_mask", return_attention_mask):
            lists["attention_mask"] = [[1] * len(ids) for ids in lists["input_ids"]]
        self._pad_lists(lists, padding, max_length, pad_to_multiple_of, padding_side)
        encoding = BatchEncoding(lists)
        if not batched and return_tensors is None:
            encoding.update({name: rows[0] for name, rows in lists.items()})
        to_arrays(encoding, return_tensors)
        return encoding

    def _pad_lists(
        self,
        lists: dict[str, list[list[Any]]],
        padding: Any,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> None:
        kind = choose("padding", padding, PADDINGS)
        check_size("pad_to_multiple_of", multiple, least=1)
        check_size("max_length", max_length)
        most = self.model_max_length if max_length is None else max_length
        if kind == "max_length" and most > LARGEST_WIDTH:
            raise TokenizerError('max_length: padding="max_length" needs one, found None and no model_max_length')
        if kind:
            pad_id = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
            if pad_id is None:
                raise TokenizerError("padding: expected a pad_token or an eos_token, found None; set one of them")
            pad_rows(lists, width_of(lists["input_ids"], kind, most, multiple), self._side(side), pad_id)

    def _side(self, side: str | None) -> str:
        return choose("padding_side", side or self.padding_side, SIDES)


def refuse_unknown(where: str, unknown: Mapping[str, Any], function: Any) -> None:
    """Raise TypeError for the first argument that is not known, with a name that is and resembles it."""
    for name in unknown.keys() - LEFTOVERS:
        known = [item for item in signature(function).parameters if item not in ("self", "unknown")]
        raise TypeError(f"{where} has no argument {name!r}{nearest(name, known) or '; leave it out'}")
