"""GPT2Tokenizer: GPT-2's byte-level BPE in pure Python, with the calls that transformers' users know."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from gpt2_multi.errors import TokenizerError, described
from gpt2_multi.files import arguments, templates
from gpt2_multi.tokenizer.calls import SIDES, SWITCH, TextReader, refuse_unknown
from gpt2_multi.tokenizer.encoding.batching import choose
from gpt2_multi.tokenizer.engine.bpe import byte_characters
from gpt2_multi.tokenizer.engine.words import repair
from gpt2_multi.tokenizer.files import (
    GPT2_PARTS,
    ROLES,
    AddedToken,
    Parts,
    Vocabulary,
    check_merges,
    check_vocab,
    read_folder,
    read_merges,
    read_tokenizer_json,
    read_vocab,
    to_tokenizer_json,
    write_folder,
    write_vocabulary,
)
from gpt2_multi.tokenizer.special import GuardedText, as_token
from gpt2_multi.tokenizer.tokens import listed

END_OF_TEXT = "<|endoftext|>"
# Arguments of the constructor that are attributes, and are saved.
SETTINGS = (
    "add_prefix_space", "add_bos_token", "add_eos_token", "errors", "model_max_length", "split_special_tokens",
    "padding_side", "truncation_side",
)  # fmt: skip
INPUT_NAMES = ("input_ids", "attention_mask")
CLEANING = "clean_up_tokenization_spaces"  # which only a caller can ask for
# Arguments of the constructor that are not settings of a folder.
UNSAID = {
    "self", "unknown", "added_tokens", "parts", "vocab", "merges", "tokenizer_file", "tokenizer_object", CLEANING,
}  # fmt: skip
File = str | PathLike[str]


class GPT2Tokenizer(TextReader):
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
        add_bos_token, add_eos_token: put the bos token before each text, the eos token after it; may be changed later.
        additional_special_tokens, extra_special_tokens: more control tokens, by either name, added to the vocabulary
            where it does not hold them.
        split_special_tokens: read control tokens in texts as ordinary text; may be changed later.
        padding_side, truncation_side: "right" or "left".
        model_max_length: the limit for truncation without `max_length`.
        chat_template: how a chat is spelled, in Jinja, or a template for each name.
        model_input_names: what calls give unless they say otherwise, of input_ids, token_type_ids and attention_mask.
        clean_up_tokenization_spaces: what `decode` does where a call does not say; no file sets it.
        vocab, merges: names of the first two in transformers 5.
        tokenizer_file, tokenizer_object: a tokenizer.json, or a Tokenizer of the library `tokenizers`, instead of the
            first two.
        added_tokens: tokens outside the merges, with their ids.
        parts: what only a tokenizer.json can say.

    Raises:
        TokenizerError: a file is missing or damaged, or a value is not one of those above.
        TypeError: an argument is not known.
    """

    is_fast = True  # as transformers has it: offsets and word_ids are there

    def __init__(
        self,
        vocab_file: File | Mapping[str, int] | None = None,
        merges_file: File | Sequence[tuple[str, str]] | None = None,
        errors: str = "replace",
        unk_token: Any = END_OF_TEXT,
        bos_token: Any = END_OF_TEXT,
        eos_token: Any = END_OF_TEXT,
        pad_token: Any = None,
        add_prefix_space: bool = False,
        add_bos_token: bool = False,
        *,
        add_eos_token: bool = False,
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
        model_input_names: Sequence[str] = INPUT_NAMES,
        clean_up_tokenization_spaces: bool | None = None,
        vocab: File | Mapping[str, int] | None = None,
        merges: File | Sequence[tuple[str, str]] | None = None,
        tokenizer_file: File | None = None,
        tokenizer_object: Any = None,
        added_tokens: Mapping[AddedToken, int] | None = None,
        parts: Parts = GPT2_PARTS,
        **unknown: Any,
    ) -> None:
        refuse_unknown("GPT2Tokenizer", unknown, GPT2Tokenizer.__init__)
        if tokenizer_file is not None or tokenizer_object is not None:
            names = {"bos_token": bos_token, "eos_token": eos_token}
            found, parts, flags = _whole(tokenizer_file, tokenizer_object, names)
            vocab_file, merges_file, added_tokens = found.vocab, found.merges, found.added
            add_bos_token = add_bos_token or flags.get("add_bos_token", False)
            add_eos_token = add_eos_token or flags.get("add_eos_token", False)
        known = _read(vocab if vocab_file is None else vocab_file, Mapping, dict, check_vocab, read_vocab)
        pairs = _read(merges if merges_file is None else merges_file, Sequence, list, check_merges, read_merges)
        self.add_prefix_space, self.add_bos_token = bool(add_prefix_space), bool(add_bos_token)
        self.add_eos_token = bool(add_eos_token)
        self.split_special_tokens = bool(choose("split_special_tokens", split_special_tokens, SWITCH))
        self.padding_side = choose("padding_side", padding_side, SIDES)
        self.truncation_side = choose("truncation_side", truncation_side, SIDES)
        self.model_max_length = model_max_length
        self.name_or_path, self.chat_template = "", chat_template
        self._kept: dict[str, Any] = {}  # entries of tokenizer_config.json that mean nothing here, written back
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        super().__init__(known, added_tokens or {}, errors, parts)
        given = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        roles = dict(zip(ROLES, given, strict=True))
        self.add_special_tokens({role: token for role, token in roles.items() if token is not None})
        more = extra_special_tokens or ()
        more = list(more.values()) if isinstance(more, Mapping) else more
        self.add_special_tokens({"additional_special_tokens": [*listed(additional_special_tokens), *listed(more)]})
        self._engine_in_python = self._engine_of(pairs)

    # --- learning ---------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[Any],
        vocab_size: int,
        *,
        special_tokens: Sequence[Any] = (),
        min_frequency: int = 0,
        length: int | None = None,
        **options: Any,
    ) -> Self:
        """Learn a vocabulary from texts, in GPT-2's order of ids: the 256 bytes, the merges, the control tokens.

        Args:
            texts: texts, lists of them, or paths (`pathlib.Path`) of files in UTF-8.
            vocab_size: how many tokens there are at most, control tokens included; few texts give fewer.
            special_tokens: control tokens beside those that have a role by `options`.
            min_frequency: how often two tokens have to meet to be merged.
            length: how many texts there are, for the progress bar.
            options: arguments of the constructor, such as bos_token, add_prefix_space and model_max_length.

        Raises:
            ImportError: the library `tokenizers` is not installed.
            TokenizerError: the size has no room for the bytes, or something is not a text.
            TypeError: an option is not known.
        """
        from gpt2_multi.tokenizer.engine.learning import check_room, learn

        sample = cls({char: at for at, char in enumerate(byte_characters())}, [], **options)
        added = [as_token(token, True) for token in special_tokens]
        names = list(dict.fromkeys([*(token.content for token in added), *sample.all_special_tokens]))
        check_room(vocab_size, len(names))
        size, prefix_space = vocab_size - len(names), sample.add_prefix_space
        vocab, merges = learn(texts, size, (), prefix_space, length, min_frequency=min_frequency)
        ids = {name: at for at, name in enumerate(names, len(vocab))}
        tokenizer = cls(vocab | ids, merges, **options)
        named = {*tokenizer.all_special_tokens}
        more = [token for token in added if token.content not in named]
        tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_additional_special_tokens=False)
        return tokenizer

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[Any],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[Any] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Self:
        """A tokenizer with these settings and control tokens that has learned from other texts.

        As in transformers the control tokens have the first ids, then come the bytes and the merges, and last the words
        that were added.

        Args:
            text_iterator: texts, or lists of them.
            vocab_size: how many tokens there are at most.
            length: how many items the iterator has, for the progress bar.
            new_special_tokens: control tokens besides.
            special_tokens_map: new names of control tokens.
            options: arguments of the trainer of `tokenizers`, such as min_frequency.

        Raises:
            ImportError, TokenizerError: as `train`.
        """
        from gpt2_multi.tokenizer.engine.learning import learn

        if not self._parts.are_gpt2:
            raise TokenizerError(
                "train_new_from_iterator: expected GPT-2's own normalizer, pre_tokenizer and post_processor, found "
                "others in tokenizer.json; use the tokenizer of transformers, or GPT2Tokenizer.train"
            )
        renamed = special_tokens_map or {}
        old = sorted((at, token) for token, at in self._control.ids.items() if self._control.tokens[token].special)
        new = [as_token(token, True) for token in new_special_tokens or ()]
        known = [self._control.tokens[token] for _, token in old]
        tokens = [replace(token, content=renamed.get(token.content, token.content)) for token in known] + new
        names = list(dict.fromkeys(token.content for token in tokens))
        vocab, merges = learn(text_iterator, vocab_size, names, self.add_prefix_space, length, **options)
        more = [renamed.get(token, token) for token in self.additional_special_tokens]
        settings: dict[str, Any] = {name: getattr(self, name) for name in SETTINGS}
        settings["additional_special_tokens"] = [*more, *(token.content for token in new)]
        settings |= {role: token and renamed.get(token, token) for role, token in self._control.roles.items()}
        added = {token: vocab[token.content] for token in tokens}
        tokenizer = type(self)(vocab, merges, added_tokens=added, chat_template=self.chat_template, **settings)
        tokenizer.add_tokens([token for token in self._control.tokens.values() if not token.special])
        return tokenizer

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
        for name in ("split_special_tokens", "padding_side", "truncation_side", "model_max_length"):
            setattr(own, name, getattr(tokenizer, name, getattr(own, name)))  # not saved where they were assigned
        return own

    @classmethod
    def _from_vocabulary(cls, found: Vocabulary, overrides: Mapping[str, Any]) -> Self:
        overrides = dict(overrides)
        for given in (found.settings, overrides):
            if "max_len" in given:  # its name in 2019
                given.setdefault("model_max_length", given.pop("max_len"))
        known = set(signature(GPT2Tokenizer.__init__).parameters) - UNSAID
        settings = {name: value for name, value in found.settings.items() if name in known}
        settings = {name: value for name, value in settings.items() if value is not None or name in ROLES}
        settings |= {CLEANING: None} | overrides
        parts, flags = _settled(found, settings)
        tokenizer = cls(found.vocab, found.merges, added_tokens=found.added, parts=parts, **(flags | settings))
        tokenizer._kept = {name: value for name, value in found.settings.items() if name not in known}
        return tokenizer

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The settings as tokenizer_config.json has them; those that mean nothing here too."""
        settings = {
            **self._kept,
            **self._control.roles,
            "additional_special_tokens": list(self._control.additional),
            **{name: getattr(self, name) for name in SETTINGS},
        }
        said = {"chat_template": templates.to_json(self.chat_template), CLEANING: self.clean_up_tokenization_spaces}
        names = {"model_input_names": self.model_input_names} if self.model_input_names != [*INPUT_NAMES] else {}
        return settings | names | {name: value for name, value in said.items() if value is not None}

    @property
    def backend_tokenizer(self) -> Any:
        """A tokenizer of the library `tokenizers` that gives the same ids: a copy, whose changes change nothing here.

        Raises:
            ImportError: the library is not installed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError('backend_tokenizer needs tokenizers: pip install "gpt2-multi[train]"') from error
        return Tokenizer.from_str(
            to_tokenizer_json(self._vocab, self._bpe.merges, self._added(), self._written(), self._parts)
        )

    def __repr__(self) -> str:
        shown = {"name_or_path": self.name_or_path, "vocab_size": self.vocab_size, "tokens": len(self)}
        shown |= {"model_max_length": self.model_max_length, "special_tokens": self.special_tokens_map}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def _added(self) -> dict[AddedToken, int]:
        return {token: self._known_id(name) for name, token in self._control.tokens.items()}

    def _written(self) -> dict[str, Any]:
        """What the files say beside the tokens."""
        ids = {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id}
        return self.init_kwargs | {"tokenizer_class": "GPT2Tokenizer", **ids}

    def save_vocabulary(self, save_directory: File, filename_prefix: str | None = None) -> tuple[str, str]:
        """Write vocab.json and merges.txt; returns their paths."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        return write_vocabulary(Path(save_directory), self._vocab, self._bpe.merges, prefix)

    def save_pretrained(self, save_directory: File, push_to_hub: bool = False, **options: Any) -> tuple[str, ...]:
        """Write the tokenizer as transformers does, for either library to load; returns the files' paths.

        `options` are those of `push_to_hub`.
        """
        options = arguments.sort_saving("save_pretrained", options)
        added, settings = self._added(), self._written()
        merges = list(self._bpe.merges)
        paths = write_folder(Path(save_directory), Vocabulary(self._vocab, merges, added, settings, self._parts))
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
        sanitize_control_tokens: bool = False,
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
            sanitize_control_tokens: for messages of strangers: control tokens that stand in them, in tools, documents
                or `names` are ordinary text, and only the template writes any. So are added words of the template.
            names: what else the template may speak of; the control tokens are there.

        Raises:
            TokenizerError: there is no template, or no Jinja, or the template refuses the messages.
        """
        masked, guarded = return_assistant_tokens_mask, sanitize_control_tokens
        going_on, gives_mask = continue_final_message, return_dict and tokenize
        templates.check_request(add_generation_prompt, going_on, masked, guarded, gives_mask, tokenize)
        chats, alone = templates.as_chats(conversation)
        template = self.get_chat_template(chat_template, tools)
        names |= {"tools": templates.schemas(tools), "documents": documents}
        guard = templates.Guard(self._written_by(template) if guarded else ())
        if guarded:
            names, chats = guard.marked(names), [guard.marked(getattr(chat, "messages", chat)) for chat in chats]
        names = {**self.special_tokens_map, **names, "add_generation_prompt": add_generation_prompt}
        made = [templates.spell(template, chat, going_on, names) for chat in chats]
        texts: list[str] = [self._guarded(guard, text) if guarded else text for text, _ in made]
        text: Any = texts[0] if alone else texts
        if not tokenize:
            return text
        options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
        options |= ({"split_special_tokens": False} if guarded else {}) | dict(tokenizer_kwargs or {})
        encoded = self(text, **{"add_special_tokens": False, "return_tensors": return_tensors, **options})
        if masked:
            masks = [row.marks(spans) for row, (_, spans) in zip(encoded.encodings or (), made, strict=True)]
            encoded["assistant_masks"] = masks[0] if alone and return_tensors is None else masks
            encoded.convert_to_tensors(return_tensors)
        return encoded if return_dict else encoded["input_ids"]

    def _written_by(self, template: str) -> list[str]:
        """The tokens that only a template may write: control tokens, and added words that stand in it."""
        words = [name for name in self._control.ids if name in template and not name.isspace()]
        return [*self._control.special(), *words]

    def _guarded(self, guard: templates.Guard, text: str) -> GuardedText:
        text, spans = guard.spans(repair(text))
        for token in {text[start:stop] for start, stop in spans if start < stop}:
            if self._known_id(token) in self._encode_ordinary(token):
                raise TokenizerError(
                    f"sanitize_control_tokens: {token!r} is what ordinary text becomes; take it out of the messages"
                )
        return GuardedText.of(text, spans)


def _read(source: Any, kind: type, copy: Any, check: Any, read: Any) -> Any:
    """A vocabulary or merges, given as they are or as a file's path."""
    if isinstance(source, str | PathLike):
        return read(Path(source))
    if isinstance(source, kind):
        return check(copy(source), "argument")
    raise TokenizerError(
        f"vocab_file, merges_file: expected a path or the content itself, found {type(source).__name__}; give both, or "
        "tokenizer_file, or call from_pretrained"
    )


def _whole(file: File | None, tokenizer: Any, roles: Mapping[str, Any]) -> tuple[Vocabulary, Parts, dict[str, bool]]:
    """What a tokenizer.json says, or a Tokenizer of `tokenizers`; its parts, and which tokens it adds."""
    if file is not None:
        found = read_tokenizer_json(Path(file))
        return found, *_settled(found, roles)
    if not hasattr(tokenizer, "save"):
        raise TokenizerError(
            f"tokenizer_object: expected a Tokenizer of tokenizers, found {described(tokenizer)}; "
            "for a file there is tokenizer_file"
        )
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        tokenizer.save(str(path))
        return _whole(path, None, roles)


def _settled(found: Vocabulary, settings: Mapping[str, Any]) -> tuple[Parts, dict[str, bool]]:
    """The parts of a tokenizer, and which tokens it adds where settings can say that.

    Raises:
        TokenizerError: settings say something else.
    """
    around = found.parts.around
    if not around.has_tokens:
        return found.parts, {}
    known = found.vocab | {token.content: at for token, at in found.added.items()}
    names = [settings.get(role, END_OF_TEXT) for role in ("bos_token", "eos_token")]
    flags = around.as_flags(*(known.get(getattr(name, "content", name)) for name in names))
    if flags is not None:
        parts = replace(found.parts, around=around.without_tokens())
        return parts, {"add_bos_token": flags[0], "add_eos_token": flags[1]}
    if said := [name for name in ("add_bos_token", "add_eos_token") if settings.get(name) is not None]:
        raise TokenizerError(
            f"{said[0]}: is {settings[said[0]]}, and the post_processor of tokenizer.json says what is added; take one "
            "of the two out of the files"
        )
    return found.parts, {}
