"""The tokens that stand outside the merges: control tokens, which text may contain only on request, and added words."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.files import AddedToken

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
Choice = Collection[str] | str  # names of control tokens, or "all"


def as_token(token: Any, special: bool) -> AddedToken:
    """A str, or an AddedToken of any library, as ours.

    Raises:
        TokenizerError: it is neither, it is empty, it holds a lone surrogate, or it asks for single_word.
    """
    content = _checked(token if isinstance(token, str) else getattr(token, "content", token))
    if isinstance(token, str):
        return AddedToken(content, special)
    if getattr(token, "single_word", False):
        raise TokenizerError(f"added token {content!r}: single_word=True is not supported; leave it out")
    return AddedToken(content, special, getattr(token, "lstrip", False), getattr(token, "rstrip", False))


def _checked(content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"added token: expected a text of at least one character, found {content!r}")
    if re.search("[\ud800-\udfff]", content):
        raise TokenizerError(f"added token {content!r}: expected text that UTF-8 can hold, found a lone surrogate")
    return content


class ControlTokens:
    """Added tokens with their ids, and which of them play a role (bos, eos, unk, pad) or are special otherwise."""

    def __init__(self) -> None:
        self.tokens: dict[str, AddedToken] = {}
        self.ids: dict[str, int] = {}
        self.roles: dict[str, str | None] = dict.fromkeys(ROLES)
        self.additional: list[str] = []
        self._finders: dict[frozenset[str], re.Pattern[str] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finders": {}}

    def add(self, token: AddedToken, at: int) -> None:
        """Add a token, or change what was known of the token of the same text."""
        self.tokens[token.content], self.ids[token.content] = token, at
        self._finders.clear()

    def special(self) -> list[str]:
        """All control tokens, each once: those with a role first."""
        roles = [name for name in self.roles.values() if name is not None]
        marked = [name for name, token in self.tokens.items() if token.special]
        return list(dict.fromkeys([*roles, *self.additional, *marked]))

    def select(self, name: str, choice: Choice) -> frozenset[str]:
        """The control tokens that an argument names.

        Raises:
            TokenizerError: it names something that is not a control token.
        """
        known = frozenset(self.special())
        if choice == "all":
            return known
        if isinstance(choice, str) or not all(isinstance(item, str) for item in choice):
            raise TokenizerError(f'{name}: expected "all" or a set of control tokens, found {choice!r}')
        if unknown := frozenset(choice) - known:
            raise TokenizerError(f"{name}: expected some of {sorted(known)}, found {sorted(unknown)}; add them first")
        return frozenset(choice)

    def refuse(self, text: str, disallowed: frozenset[str]) -> None:
        """Refuse a text that contains one of the given tokens.

        Raises:
            TokenizerError: it does.
        """
        for token in disallowed:
            if (at := text.find(token)) >= 0:
                raise TokenizerError(
                    f"text: expected no control token, found {token!r} at character {at}; name it in allowed_special "
                    "to make it one token, or leave it out of disallowed_special to encode it as ordinary text"
                )

    def split(self, text: str, allowed: frozenset[str]) -> Iterator[tuple[str, int | None]]:
        """The parts of a text in order, each with its id if it is an added word or an allowed control token."""
        finder = self._finder(allowed)
        start = 0
        for match in finder.finditer(text) if finder else ():
            if match.start() > start:
                yield text[start : match.start()], None
            yield match[0], self.ids[match[match.lastindex or 0]]
            start = match.end()
        if start < len(text):
            yield text[start:] if start else text, None

    def _finder(self, allowed: frozenset[str]) -> re.Pattern[str] | None:
        if allowed not in self._finders:
            self._finders[allowed] = self._compile(allowed)
        return self._finders[allowed]

    def _compile(self, allowed: frozenset[str]) -> re.Pattern[str] | None:
        special = frozenset(self.special())
        wanted = [token for name, token in self.tokens.items() if name in allowed or name not in special]
        wanted.sort(key=lambda token: -len(token.content))
        if not wanted:
            return None
        space = {True: r"\s*", False: ""}
        parts = (f"{space[token.lstrip]}({re.escape(token.content)}){space[token.rstrip]}" for token in wanted)
        return re.compile("|".join(parts))
