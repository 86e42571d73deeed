"""GPT2Tokenizer: GPT-2's byte-level BPE in pure Python, with the calls that transformers' users know."""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from gpt2_multi.errors import TokenizerError, described, nearest
from gpt2_multi.files import arguments, templates
from gpt2_multi.tokenizer.batching import (
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
from gpt2_multi.tokenizer.encoding import BatchEncoding, to_arrays
from gpt2_multi.tokenizer.engine.bpe import BPE
from gpt2_multi.tokenizer.files import (
    ROLES,
    AddedToken,
    Vocabulary,
    check_merges,
    check_vocab,
    read_folder,
    read_merges,
    read_vocab,
    write_folder,
    write_vocabulary,
)
from gpt2_multi.tokenizer.reading import Reader, Texts
from gpt2_multi.tokenizer.special import Choice
from gpt2_multi.tokenizer.tokens import TokenTable, listed

END_OF_TEXT = "<|endoftext|>"
SIDES = {"right": "right", "left": "left"}
LEFTOVERS = (*arguments.TOKENIZER_ONLY, "verbose")  # which mean nothing here, whatever they are
SWITCH = {False: "", True: "yes"}
LARGEST_WIDTH = 10**9  # transformers writes 10**30 where a tokenizer has no limit
NOTHING: frozenset[str] = frozenset()
File = str | PathLike[str]


class GPT2Tokenizer(TokenTable):
    """GPT-2's tokenizer: text to ids, and back without any loss.

    Control tokens and words that were added are found in texts, as in transformers: `<|endoftext|>` is the end token
    wherever it stands. Whoever reads texts of strangers sets `split_special_tokens`: then no text becomes a control
    token, unless a call names it in `allowed_special`. Decoding never cleans up spaces.

    Where padding is asked for and there is no pad token, rows are filled with the end token under a mask of 0.

    Args:
        vocab_file: vocab.json, or the mapping from tokens to ids itself.
        merges_file: merges.txt, or the list of pairs itself.
        errors: how `decode` treats bytes that are not UTF-8: "replace", "strict" or "ignore".
        unk_token, bos_token, eos_token, pad_token, sep_token, cls_token, mask_token: added to the vocabulary where it
            does not hold them.
        add_prefix_space: put a space before each text, and what follows a token that is found in it, if there is none.
        add_bos_token: put the bos token before each text; may be changed later.
        additional_special_tokens, extra_special_tokens: more control tokens, by either name, added to the vocabulary
            where it does not hold them.
        split_special_tokens: read control tokens in texts as ordinary text; may be changed later.
        padding_side, truncation_side: "right" or "left".
        model_max_length: the limit for truncation without `max_length`.
        chat_template: how a chat is spelled, in Jinja, or a template for each name.
        added_tokens: tokens outside the merges, with their ids.

    Raises:
        TokenizerError: a file is missing or damaged, or a value is not one of those above.
        TypeError: an argument is not known.
    """

    is_fast = True  # as transformers has it: offsets and word_ids are there
    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: File | Mapping[str, int],
        merges_file: File | Sequence[tuple[str, str]],
        errors: str = "replace",
        unk_token: Any = END_OF_TEXT,
        bos_token: Any = END_OF_TEXT,
        eos_token: Any = END_OF_TEXT,
        pad_token: Any = None,
        add_prefix_space: bool = False,
        add_bos_token: bool = False,
        *,
        sep_token: Any = None,
        cls_token: Any = None,
        mask_token: Any = None,
        additional_special_tokens: Sequence[Any] = (),
        extra_special_tokens: Sequence[Any] | Mapping[str, Any] = (),
        split_special_tokens: bool = False,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int = 1024,
        chat_template: Any = None,
        added_tokens: Mapping[AddedToken, int] | None = None,
        **unknown: Any,
    ) -> None:
        _refuse_unknown("GPT2Tokenizer", unknown, GPT2Tokenizer.__init__)
        vocab = _read(vocab_file, Mapping, dict, check_vocab, read_vocab)
        merges = _read(merges_file, Sequence, list, check_merges, read_merges)
        self.add_prefix_space, self.add_bos_token = bool(add_prefix_space), bool(add_bos_token)
        self.split_special_tokens = bool(choose("split_special_tokens", split_special_tokens, SWITCH))
        self.padding_side = choose("padding_side", padding_side, SIDES)
        self.truncation_side = choose("truncation_side", truncation_side, SIDES)
        self.model_max_length = model_max_length
        self.name_or_path, self.chat_template = "", chat_template
        self._kept: dict[str, Any] = {}  # entries of tokenizer_config.json that mean nothing here, written back
        super().__init__(vocab, added_tokens or {}, errors)
        given = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        roles = dict(zip(ROLES, given, strict=True))
        self.add_special_tokens({role: token for role, token in roles.items() if token is not None})
        more = extra_special_tokens or ()
        more = list(more.values()) if isinstance(more, Mapping) else more
        self.add_special_tokens({"additional_special_tokens": [*listed(additional_special_tokens), *listed(more)]})
        self._engine_in_python = BPE(self._vocab, merges, self.unk_token_id)

    @property
    def _bpe(self) -> BPE:
        """The engine, with the unknown token that there is now."""
        if self._engine_in_python.unk_id != self.unk_token_id:
            self._engine_in_python = BPE(self._vocab, self._engine_in_python.merges, self.unk_token_id)
        return self._engine_in_python

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: File,
        **options: Any,
    ) -> Self:
        """Load a tokenizer from a folder, or from the Hugging Face hub by name.

        Of the files in the folder the first of these is taken: tokenizer.json; vocab.json with merges.txt; encoder.json
        with vocab.bpe. Settings in tokenizer_config.json win over those in special_tokens_map.json, and these over
        those in tokenizer.json. `options` say where the files are (`revision`, `token`, `cache_dir`,
        `local_files_only`, `subfolder` and so on), and are arguments of the constructor, which win over all.

        Raises:
            TokenizerError: no tokenizer is there, or it is damaged, or it is not of GPT-2's kind.
            InputError: an option cannot be honoured.
            TypeError: an option is not known.
        """
        name, (place, overrides) = pretrained_model_name_or_path, arguments.sort(options, arguments.TOKENIZER_ONLY)
        folder = Path(name)
        if place.get("subfolder") or not folder.is_dir():
            from gpt2_multi.files.hub import RENAMED, TOKENIZER, resolve

            name = name if isinstance(name, PathLike) else str(name)
            folder = resolve(name, **place, allow_patterns=[*TOKENIZER, *RENAMED.values()])
        tokenizer = cls._from_vocabulary(read_folder(folder), overrides)
        tokenizer.name_or_path = str(name)
        return tokenizer

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "GPT2Tokenizer":
        """A tokenizer of another library that saves what transformers' do, as one of this class; ours as it is.

        Raises:
            TokenizerError: it is not of GPT-2's kind.
        """
        if isinstance(tokenizer, GPT2Tokenizer):
            return tokenizer
        if not hasattr(tokenizer, "save_pretrained"):
            raise TokenizerError(
                f"tokenizer: expected one of GPT-2's kind, found {described(tokenizer)}; "
                "use GPT2Tokenizer.from_pretrained"
            )
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            try:
                own = cls.from_pretrained(folder)
            except TokenizerError as error:
                reason = str(error).replace(f"{Path(folder)}/", "")
                raise TokenizerError(
                    f"tokenizer: expected one of GPT-2's kind, found {described(tokenizer)} ({reason}); "
                    "use GPT2Tokenizer.from_pretrained"
                ) from None
        own.name_or_path = str(getattr(tokenizer, "name_or_path", ""))
        return own

    @classmethod
    def _from_vocabulary(cls, found: Vocabulary, overrides: Mapping[str, Any]) -> Self:
        overrides = dict(overrides)
        for given in (found.settings, overrides):
            if "max_len" in given:  # its name in 2019
                given.setdefault("model_max_length", given.pop("max_len"))
        known = set(signature(GPT2Tokenizer.__init__).parameters) - {"self", "unknown", "added_tokens"}
        settings = {name: value for name, value in found.settings.items() if name in known}
        settings = {name: value for name, value in settings.items() if value is not None or name in ROLES}
        tokenizer = cls(found.vocab, found.merges, added_tokens=found.added, **(settings | overrides))
        tokenizer._kept = {name: value for name, value in found.settings.items() if name not in known}
        return tokenizer

    def save_vocabulary(self, save_directory: File, filename_prefix: str | None = None) -> tuple[str, str]:
        """Write vocab.json and merges.txt; returns their paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        return write_vocabulary(Path(save_directory), self._vocab, self._bpe.merges, prefix)

    def save_pretrained(self, save_directory: File, push_to_hub: bool = False, **options: Any) -> tuple[str, ...]:
        """Write the tokenizer as transformers does, for either library to load; returns the files' paths.

        `options` are those of `push_to_hub`.
        """
        options = arguments.sort_saving("save_pretrained", options)
        added = {token: self._known_id(name) for name, token in self._control.tokens.items()}
        settings = {
            **self._kept,
            "tokenizer_class": "GPT2Tokenizer",
            **self._control.roles,
            "bos_token_id": self.bos_token_id,
            "additional_special_tokens": list(self._control.additional),
            **{
                name: getattr(self, name)
                for name in ("add_prefix_space", "add_bos_token", "errors", "model_max_length", "split_special_tokens")
            },
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
        }
        if self.chat_template is not None:
            settings["chat_template"] = templates.to_json(self.chat_template)
        paths = write_folder(Path(save_directory), Vocabulary(self._vocab, list(self._bpe.merges), added, settings))
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **options})
        return paths

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the tokenizer to a model of the hub: see `files.hub.push`, which `options` are for."""
        from gpt2_multi.files.hub import push

        return push(self.save_pretrained, repo_id, **arguments.sort_saving("push_to_hub", options))

    # --- chats -------------------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> Any:
        """How a chat is spelled, in Jinja, or a template for each name; saved with the tokenizer."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        self._chat_template = templates.from_json(template)

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template of a name, or the text that is given as one; without either the tokenizer's own.

        Raises:
            TokenizerError: there is none.
        """
        return templates.pick(self.chat_template, chat_template, tools)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **names: Any,
    ) -> Any:
        """What a chat, a list of `{"role": ..., "content": ...}`, or a list of chats is as ids, or as a text.

        Args:
            conversation: the chat, or several.
            tools, documents: dicts of which the template may speak; of tools JSON schemas.
            chat_template: a template, or the name of one of several; the tokenizer's own without it.
            add_generation_prompt: go on to where the assistant's message begins.
            continue_final_message: leave the last message open; a text names its field, instead of "content".
            tokenize: ids; otherwise a text.
            padding, truncation, max_length, return_tensors: as in a call of the tokenizer.
            return_dict: all that a call gives instead of `input_ids`.
            return_assistant_tokens_mask: with `return_dict`, `assistant_masks` of 1 for tokens that begin within
                `{% generation %}` of the template.
            tokenizer_kwargs: other arguments of a call of the tokenizer.
            names: what else the template may speak of; the control tokens are there.

        Raises:
            TokenizerError: there is no template, or no Jinja, or the template refuses the messages.
        """
        templates.check_request(add_generation_prompt, continue_final_message, return_assistant_tokens_mask, names)
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise TokenizerError("return_assistant_tokens_mask: is an entry of what return_dict=True gives; set it too")
        chats, alone = templates.as_chats(conversation)
        names = {**self.special_tokens_map, **names, "tools": templates.schemas(tools), "documents": documents}
        names["add_generation_prompt"] = add_generation_prompt
        template = self.get_chat_template(chat_template, tools)
        made = [templates.spell(template, chat, continue_final_message, names) for chat in chats]
        text = made[0][0] if alone else [text for text, _ in made]
        if not tokenize:
            return text
        options = {"padding": padding, "truncation": truncation, "max_length": max_length, **(tokenizer_kwargs or {})}
        encoded = self(text, **{"add_special_tokens": False, "return_tensors": return_tensors, **options})
        if return_assistant_tokens_mask:
            masks = [row.marks(spans) for row, (_, spans) in zip(encoded.encodings or (), made, strict=True)]
            encoded["assistant_masks"] = masks[0] if alone and return_tensors is None else masks
            encoded.convert_to_tensors(return_tensors)
        return encoded if return_dict else encoded["input_ids"]

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
    ) -> list[str]:
        """The tokens of one text (and its pair), spelled as in vocab.json."""
        ids = self.encode(
            text,
            pair,
            add_special_tokens,
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
            add_special_tokens: whether `add_bos_token` has an effect.
            padding: True or "longest" pads to the longest row, "max_length" to `max_length`.
            truncation: True or "longest_first", "only_first", "only_second". None truncates where `max_length` is given
                and `padding` is not asked for.
            max_length: the limit in tokens, added ones included; without it that of `model_max_length`.
            stride: how many tokens a further window repeats, with `return_overflowing_tokens`.
            is_split_into_words: the text is a list of words; each gets a space before it.
            pad_to_multiple_of: pad to the next multiple.
            padding_side: "right" or "left" for this call.
            return_tensors: "np", "pt", "tf" or "jax"; without it lists.
            return_attention_mask: False leaves out the mask.
            return_overflowing_tokens: return what truncation cuts off as further rows, and
                `overflow_to_sample_mapping`, the text that each row belongs to.
            return_special_tokens_mask: mark tokens that were added.
            return_offsets_mapping: for each token the span of characters in the text that it stands for. A token that
                is a part of a character has the character's span.
            return_length: the number of tokens in each row, padding included.
            return_token_type_ids: 0 for the text, 1 for its pair.
            split_special_tokens: read control tokens in the texts as ordinary text; by default as the attribute says.
            allowed_special: the control tokens, or "all", that become one token where a text contains them; by default
                all that are not disallowed, and none with `split_special_tokens`.
            disallowed_special: the control tokens, or "all" others, that a text may not contain.

        Raises:
            TokenizerError: an argument is none of these, or the text contains a token that is not allowed.
            TypeError: an argument is not known.
        """
        padding, truncation = as_today(padding, truncation, max_length, unknown)
        _refuse_unknown("a call of the tokenizer", unknown, GPT2Tokenizer.__call__)
        check_size("stride", stride)
        texts, pairs, batched = as_batch(text, text_pair, is_split_into_words)
        control = self._choose_control(split_special_tokens, allowed_special, disallowed_special)
        prefix_space = self.add_prefix_space or is_split_into_words
        given = Texts(
            [column for column in (texts, pairs) if column is not None],
            Reader(self._control, self._bpe, self._encode_ordinary, self._bytes, *control, prefix_space),
            is_split_into_words,
            self._prefix() if add_special_tokens else [],
            *self._limit(truncation, max_length, padding),
            stride if return_overflowing_tokens else None,
            self.truncation_side,
        )
        rows, owners = given.rows(return_offsets_mapping)
        wanted = {
            "input_ids": True,
            "token_type_ids": return_token_type_ids,
            "attention_mask": return_attention_mask is not False,
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        lists = {name: [row.entry(name) for row in rows] for name, asked in wanted.items() if asked}
        self._pad_lists(lists, padding, max_length, pad_to_multiple_of, padding_side)
        encoding = BatchEncoding(lists)
        make = partial(given.encodings, lists["input_ids"], self._side(padding_side), self.convert_ids_to_tokens)
        encoding.trace(make, len(given.columns), return_offsets_mapping or is_split_into_words)
        if return_length:
            encoding["length"] = [len(ids) for ids in lists["input_ids"]]
        if return_overflowing_tokens:
            encoding["overflow_to_sample_mapping"] = owners
        if not batched and return_tensors is None and not return_overflowing_tokens:
            encoding.update({name: value[0] for name, value in encoding.items() if name != "length"})
        to_arrays(encoding, return_tensors)
        return encoding

    encode_plus = batch_encode_plus = __call__

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
        if "attention_mask" not in lists and return_attention_mask is not False:
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


def _read(source: Any, kind: type, copy: Any, check: Any, read: Any) -> Any:
    """A vocabulary or merges, given as they are or as a file's path."""
    if isinstance(source, str | PathLike):
        return read(Path(source))
    if isinstance(source, kind):
        return check(copy(source), "argument")
    raise TokenizerError(
        f"vocab_file, merges_file: expected a path or the content itself, found {type(source).__name__}"
    )


def _refuse_unknown(where: str, unknown: Mapping[str, Any], function: Any) -> None:
    """Raise TypeError for the first argument that is not known, with a name that is and resembles it."""
    for name in unknown.keys() - LEFTOVERS:
        known = [item for item in signature(function).parameters if item not in ("self", "unknown")]
        raise TypeError(f"{where} has no argument {name!r}{nearest(name, known) or '; leave it out'}")
