"""The tokens of a tokenizer: ids, texts and bytes, added tokens, and the roles that some of them play."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar, overload

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.encoding.batching import FILLERS, choose
from gpt2_multi.tokenizer.encoding.results import Row, Tokens
from gpt2_multi.tokenizer.engine.bpe import byte_characters, unspell
from gpt2_multi.tokenizer.files import GPT2_PARTS, ROLES, AddedToken, Parts, Piece, flagged
from gpt2_multi.tokenizer.special import ControlTokens, as_token

T = TypeVar("T")
ERRORS = {name: name for name in ("strict", "replace", "ignore", "backslashreplace", "surrogateescape")}


def _role(name: str) -> property:
    """A role's token, as transformers has it: `bos_token` and so on; assignable."""

    def get(self: "TokenTable") -> str | None:
        return self._control.roles[name]

    def assign(self: "TokenTable", token: Any) -> None:
        self._assign_role(name, token)

    return property(get, assign, doc=f"The {name}; assigning a token that the tokenizer does not know is an error.")


def _role_id(name: str) -> property:
    def get(self: "TokenTable") -> int | None:
        token = self._control.roles[name]
        return None if token is None else self._known_id(token)

    def assign(self: "TokenTable", at: int | None) -> None:
        self._assign_role(name, None if at is None else self.convert_ids_to_tokens(at))

    return property(get, assign, doc=f"The id of the {name}, or None; assignable.")


ADDITIONAL = ("additional_special_tokens", "extra_special_tokens")  # the names of transformers 4 and 5
SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # in this order


class TokenTable:
    """A vocabulary, what was added to it, and the conversions between ids, tokens and bytes.

    Args:
        vocab: token -> id, tokens spelled as in vocab.json.
        added_tokens: tokens outside the merges, with their ids.
        errors: how bytes that are not UTF-8 are decoded.
        parts: what only a tokenizer.json can say.
    """

    SPECIAL_TOKENS_ATTRIBUTES = (*ROLES, ADDITIONAL[0])
    add_bos_token: bool
    add_eos_token: bool
    model_max_length: int
    clean_up_tokenization_spaces: bool | None
    bos_token, bos_token_id = _role("bos_token"), _role_id("bos_token")
    eos_token, eos_token_id = _role("eos_token"), _role_id("eos_token")
    unk_token, unk_token_id = _role("unk_token"), _role_id("unk_token")
    sep_token, sep_token_id = _role("sep_token"), _role_id("sep_token")
    pad_token, pad_token_id = _role("pad_token"), _role_id("pad_token")
    cls_token, cls_token_id = _role("cls_token"), _role_id("cls_token")
    mask_token, mask_token_id = _role("mask_token"), _role_id("mask_token")

    def __init__(
        self, vocab: Mapping[str, int], added_tokens: Mapping[AddedToken, int], errors: str, parts: Parts = GPT2_PARTS
    ) -> None:
        self._vocab, self._parts = dict(vocab), parts
        self.errors = choose("errors", errors, ERRORS)
        self._bytes = {at: unspell(token) for token, at in vocab.items()}
        self._spelled = {at: token for token, at in vocab.items()}
        self._control = ControlTokens(parts.steps)
        for token, at in added_tokens.items():
            self._register(token, at)

    @property
    def pad_token_type_id(self) -> int:
        """What `token_type_ids` are filled with."""
        return FILLERS["token_type_ids"]  # type: ignore[no-any-return]

    @property
    def max_len(self) -> int:
        """What `model_max_length` was in 2019."""
        return self.model_max_length

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of a text a row has room for."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens of a text and its pair a row has room for."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary without added tokens."""
        return len(self._vocab)

    def __len__(self) -> int:
        return len(self._spelled)

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones too."""
        return self._vocab | self._control.ids

    @property
    def vocab(self) -> dict[str, int]:
        """Every token with its id, added ones too."""
        return self.get_vocab()

    @property
    def encoder(self) -> dict[str, int]:
        """The vocabulary without added tokens, as transformers 4 has it: token -> id."""
        return dict(self._vocab)

    @property
    def decoder(self) -> dict[int, str]:
        """The vocabulary without added tokens, as transformers 4 has it: id -> token."""
        return {at: token for token, at in self._vocab.items()}

    @property
    def byte_encoder(self) -> dict[int, str]:
        """The character that vocab.json has for each byte."""
        return dict(enumerate(byte_characters()))

    @property
    def byte_decoder(self) -> dict[str, int]:
        """The byte of each character of vocab.json."""
        return {char: byte for byte, char in self.byte_encoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The tokens outside the merges with their ids, control tokens too."""
        return self.added_tokens_encoder

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The tokens outside the merges with their ids, control tokens too."""
        return dict(self._control.ids)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens outside the merges by id."""
        return {at: self._control.tokens[name] for name, at in self._control.ids.items()}

    @property
    def all_special_tokens(self) -> list[str]:
        """The control tokens with a role, and the additional ones, each once."""
        return self._control.named()

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return [self._known_id(token) for token in self.all_special_tokens]

    @property
    def additional_special_tokens(self) -> list[str]:
        """The control tokens without a role; assigning a token that the tokenizer does not know is an error."""
        return list(self._control.additional)

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Any) -> None:
        found = [self._as_token(token, True) for token in listed(tokens)]
        for token in found:
            self._check_known("additional_special_tokens", token.content, [token.content])
        self._control.additional = list(dict.fromkeys(self._register(token) for token in found))

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`; assignable."""
        return [self._known_id(token) for token in self._control.additional]

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int]) -> None:
        self.additional_special_tokens = self.convert_ids_to_tokens(ids)

    extra_special_tokens = additional_special_tokens  # their name in transformers 5
    extra_special_tokens_ids = additional_special_tokens_ids

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The roles that are set, with their tokens."""
        roles: dict[str, Any] = {role: token for role, token in self._control.roles.items() if token is not None}
        more = {"additional_special_tokens": self.additional_special_tokens} if self._control.additional else {}
        return roles | more

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add words that are always one token wherever a text contains them; control tokens with `special_tokens`.

        Returns:
            How many of them the tokenizer did not know before.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) or hasattr(new_tokens, "content") else new_tokens
        before = len(self)
        for token in tokens:
            self._register(self._as_token(token, special_tokens or bool(getattr(token, "special", False))))
        return len(self) - before

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_additional_special_tokens: bool = True,
        *,
        replace_extra_special_tokens: bool | None = None,
    ) -> int:
        """Register control tokens: {"pad_token": "<pad>", "additional_special_tokens": ["<user>"]}.

        They get ids, `decode(skip_special_tokens=True)` skips them, and they are found in texts, unless
        `split_special_tokens` is set. `extra_special_tokens` is the name of the additional ones in transformers 5.

        Args:
            special_tokens_dict: tokens by their roles.
            replace_additional_special_tokens: whether additional ones take the place of those before, which go on
                being found in texts and skipped, or join them.
            replace_extra_special_tokens: its name in transformers 5.

        Returns:
            How many of them the tokenizer did not know before.
        """
        before, replace = len(self), replace_additional_special_tokens
        replace = replace if replace_extra_special_tokens is None else replace_extra_special_tokens
        for role, value in special_tokens_dict.items():
            if role in ADDITIONAL:
                names = [self._register(self._as_token(token, True)) for token in listed(value)]
                kept = () if replace and names else self._control.additional
                self._control.additional = list(dict.fromkeys([*kept, *names]))
            elif role in ROLES:
                self._control.roles[role] = self._register(self._as_token(value, True))
            else:
                expected = [*ROLES, ADDITIONAL[0]]
                raise TokenizerError(f"add_special_tokens: expected some of {expected}, found {role!r}")
        return len(self) - before

    def _as_token(self, token: Any, special: bool) -> AddedToken:
        """A token to be added; of one that is known, its text alone changes no flag, and control tokens stay some."""
        made = as_token(token, special)
        if (known := self._control.tokens.get(made.content)) is None:
            return made
        return replace(known if isinstance(token, str) else made, special=known.special or made.special)

    def _register(self, token: AddedToken, at: int | None = None) -> str:
        """Give a token an id if it has none, and remember it."""
        known = self._control.ids.get(token.content, self._vocab.get(token.content))
        if at is None:
            at = known if known is not None else max(self._spelled, default=-1) + 1
        if at != known and (known is not None or at in self._spelled):
            wanted = "an id of its own" if known is None else f"the id {known}"
            raise TokenizerError(
                f"added token {token.content!r}: expected {wanted}, found {at}; take the files from one tokenizer"
            )
        if known is None:
            self._spelled[at], self._bytes[at] = token.content, token.content.encode("utf-8", "replace")
        self._control.add(token, at)
        return token.content

    def _assign_role(self, role: str, token: Any) -> None:
        if token is not None:
            token = self._as_token(token, True)
            self._check_known(role, token.content, token.content)
            self._register(token)
        self._control.roles[role] = token and token.content

    def _check_known(self, role: str, content: str, given: Any) -> None:
        if content not in self._vocab and content not in self._control.ids:
            raise TokenizerError(
                f"{role}: expected a token of the vocabulary, found {content!r}; "
                f"add_special_tokens({{{role!r}: {given!r}}}) gives it an id"
            )

    @property
    def control_ids(self) -> list[int]:
        """The ids of all control tokens, those that were replaced or added by `add_tokens` too: what decoding skips."""
        return [self._known_id(token) for token in self._control.special()]

    def _known_id(self, token: str) -> int:
        at = self._control.ids.get(token)
        return self._vocab[token] if at is None else at

    # --- what a call adds to ids --------------------------------------------------------------------------------------

    def _row(self, texts: int = 1) -> tuple[Piece, ...]:
        """What a call makes of a text, or of two."""
        if self._parts.around.has_tokens:
            if self.add_bos_token or self.add_eos_token:
                raise TokenizerError(
                    "add_bos_token, add_eos_token: expected False, since the post_processor of tokenizer.json says "
                    "what is added, found True; unset them, or take it out of the file"
                )
            return self._parts.around.row(texts)
        begin, end = self._around("add_bos_token", "bos_token"), self._around("add_eos_token", "eos_token")
        return flagged(begin, end, texts)

    def _around(self, flag: str, role: str) -> tuple[int, ...]:
        if not getattr(self, flag):
            return ()
        if (at := getattr(self, f"{role}_id")) is None:
            raise TokenizerError(
                f"{flag}: expected {'an' if role[0] == 'e' else 'a'} {role}, found None; set it, or unset {flag}"
            )
        return (at,)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens a call adds to a text, or to a pair."""
        return sum(len(piece.ids) for piece in self._row(2 if pair else 1))

    num_added_tokens = num_special_tokens_to_add  # its name in 2019

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The ids of a text, and of its pair, with those that a call adds."""
        return self._built(token_ids_0, token_ids_1).entry("input_ids")

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """For each id that `build_inputs_with_special_tokens` gives: 0 in the text, 1 in its pair."""
        return self._built(token_ids_0, token_ids_1).entry("token_type_ids")

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each id that a call adds; with `already_has_special_tokens`, for each control token among the ids."""
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(at in special) for at in token_ids_0]
        return self._built(token_ids_0, token_ids_1).entry("special_tokens_mask")

    def _built(self, first: Sequence[int], second: Sequence[int] | None) -> Row:
        texts = [list(ids) for ids in (first, second) if ids is not None]
        return Row([Tokens(ids) for ids in texts], [range(len(ids)) for ids in texts], self._row(len(texts)))

    # --- conversions -------------------------------------------------------------------------------------------------

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or of each: that of the unknown token where the vocabulary does not hold it."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        known = self._control.ids.get(tokens, self._vocab.get(tokens))
        return self.unk_token_id if known is None else known

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = False) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str | list[str]:
        """The token of an id, or of each, spelled as in vocab.json.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        tokens = [self._lookup(self._spelled, at) for at in self._wanted(ids, skip_special_tokens)]
        return tokens if isinstance(to_list(ids), list) else tokens[0]

    def decode_bytes(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> bytes:
        """The bytes that ids stand for, which need not be whole characters.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        wanted = self._wanted(ids, skip_special_tokens)
        try:
            return b"".join(map(self._bytes.__getitem__, wanted))
        except KeyError as error:
            self._refuse(error.args[0])

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        spaces_between_special_tokens: bool = True,
    ) -> Any:
        """The text of ids: exactly what was encoded; of several rows of ids a list, as `batch_decode` gives it.

        Args:
            token_ids: ids in a list or in an array of any framework, or one id; or rows of them.
            skip_special_tokens: leave control tokens out.
            clean_up_tokenization_spaces: take spaces before English punctuation away, as transformers does, even those
                that were encoded; by default as the attribute says.
            spaces_between_special_tokens: means nothing here, as in transformers' fast tokenizers.

        Raises:
            TokenizerError: an id is outside the vocabulary.
            UnicodeDecodeError: the bytes are not UTF-8 and `errors` is "strict".
        """
        ids, clean = to_list(token_ids), clean_up_tokenization_spaces
        if isinstance(ids, list) and ids and isinstance(to_list(ids[0]), list):
            return self.batch_decode(ids, skip_special_tokens, clean)
        text = self.decode_bytes(ids, skip_special_tokens).decode("utf-8", self.errors)
        clean = self.clean_up_tokenization_spaces if clean is None else clean
        return self.clean_up_tokenization(text) if clean else text

    @staticmethod
    def clean_up_tokenization(text: str) -> str:
        """A text without the spaces before English marks and endings, which GPT-2 itself never adds."""
        for spaced in SPACED:
            text = text.replace(spaced, spaced.strip())
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        spaces_between_special_tokens: bool = True,
    ) -> list[str]:
        """The text of each row of ids; see `decode`."""
        clean = clean_up_tokenization_spaces
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces=clean) for row in sequences]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """The text of tokens that are spelled as in vocab.json, whatever is cleaned up elsewhere.

        Raises:
            TokenizerError: a token is not in the vocabulary.
        """
        known = self.get_vocab()
        if unknown := [token for token in tokens if token not in known]:
            raise TokenizerError(
                f"tokens: expected tokens of the vocabulary, found {unknown[0]!r}; use tokenize() to get them"
            )
        return self.decode_bytes([known[token] for token in tokens]).decode("utf-8", self.errors)

    def _wanted(self, ids: Any, skip_special_tokens: bool) -> list[Any]:
        ids = to_list(ids)
        ids = ids if isinstance(ids, list) else [ids]
        ids = ids if set(map(type, ids)) <= {int} else [self._number(at) for at in ids]
        skipped = set(self.control_ids) if skip_special_tokens else ()
        return [at for at in ids if at not in skipped] if skipped else ids

    def _number(self, at: Any) -> int:
        """An id as an int, which an array of any framework may hold."""
        number = to_list(at)
        return int(number) if isinstance(number, int) and not isinstance(number, bool) else self._refuse(at)

    def _lookup(self, table: Mapping[int, T], at: int) -> T:
        return table[at] if at in table else self._refuse(at)

    def _refuse(self, at: Any) -> NoReturn:
        raise TokenizerError(
            f"ids: expected whole numbers from 0 to {max(self._spelled)} that the vocabulary holds, found {at!r}; "
            "use the tokenizer that belongs to the model"
        )


def listed(tokens: Any) -> list[Any]:
    """Additional control tokens as a list; TokenizerError where they are none."""
    if isinstance(tokens, str | Mapping) or not isinstance(tokens, Iterable | None):
        raise TokenizerError(
            f"additional_special_tokens: expected a list of tokens, found {tokens!r}; put it in a list"
        )
    return list(tokens or ())


def to_list(ids: Any) -> Any:
    """Lists from the arrays of any framework, from tuples and other iterables; a single number stays one."""
    if hasattr(ids, "tolist"):
        return ids.tolist()
    if hasattr(ids, "numpy"):
        return ids.numpy().tolist()
    return ids if isinstance(ids, int | str) or not isinstance(ids, Iterable) else list(ids)
