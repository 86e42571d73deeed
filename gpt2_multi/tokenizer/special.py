"""The tokens that stand outside the merges, control tokens and added words, and how a text is searched for them."""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from unicodedata import category

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine.words import code_point_classes
from gpt2_multi.tokenizer.files import GPT2_STEPS, ROLES, AddedToken, Steps

BRANCHES, DEPTH = 8, 4  # of a pattern: what is tried one by one, and characters that it is divided by at most
JOINERS = "\u200c\u200d"
CIRCLED = (range(0x24B6, 0x24EA), range(0x1F130, 0x1F14A), range(0x1F150, 0x1F16A), range(0x1F170, 0x1F18A))  # letters
Choice = Collection[str] | str  # names of control tokens, or "all"


def as_token(token: Any, special: bool) -> AddedToken:
    """A str, or an AddedToken of any library, as ours.

    Raises:
        TokenizerError: it is neither, it is empty, or it holds a lone surrogate.
    """
    content = _checked(token if isinstance(token, str) else getattr(token, "content", token))
    if isinstance(token, str):
        return AddedToken(content, special)
    flags = {name: getattr(token, name, False) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(content, special, **flags, normalized=getattr(token, "normalized", None))


def _checked(content: Any) -> str:
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"added token: expected a text of at least one character, found {content!r}")
    if re.search("[\ud800-\udfff]", content):
        raise TokenizerError(f"added token {content!r}: expected text that UTF-8 can hold, found a lone surrogate")
    return content


class Part(NamedTuple):
    """A part of a text: where it begins in it, and the id of the token that it is, if it is one.

    goes_on: it is text that goes on from what stands before it, where a guarded span begins or ends.
    """

    start: int
    text: str
    id: int | None
    goes_on: bool = False


class GuardedText(str):
    """A text with spans in which no token is looked for, and which no token reaches into."""

    spans: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, text: str, spans: Sequence[tuple[int, int]]) -> "GuardedText":
        """A text with its spans, from the left."""
        found = cls(text)
        found.spans = spans
        return found


class Finder(NamedTuple):
    """What finds tokens: the pattern, their names by what is found, and whether that is in normalized text."""

    pattern: re.Pattern[str]
    names: dict[str, str]
    late: bool


class ControlTokens:
    """Added tokens with their ids, and which of them play a role (bos, eos, unk, ...) or are special otherwise."""

    def __init__(self, steps: Steps = GPT2_STEPS) -> None:
        self.tokens: dict[str, AddedToken] = {}
        self.ids: dict[str, int] = {}
        self.roles: dict[str, str | None] = dict.fromkeys(ROLES)
        self.additional: list[str] = []
        self.steps = steps
        self._finders: list[Finder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_finders": None}

    def add(self, token: AddedToken, at: int) -> None:
        """Add a token, or change what was known of the token of the same text."""
        self.tokens[token.content], self.ids[token.content] = token, at
        self._finders = None

    def named(self) -> list[str]:
        """The control tokens with a role, and the additional ones, each once."""
        roles = [name for name in self.roles.values() if name is not None]
        return list(dict.fromkeys([*roles, *self.additional]))

    def special(self) -> list[str]:
        """All control tokens, each once: those with a role first."""
        marked = [name for name, token in self.tokens.items() if token.special]
        return list(dict.fromkeys([*self.named(), *marked]))

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
                    "to make it one token, or give split_special_tokens instead to encode it as ordinary text"
                )

    def split(
        self, text: str, allowed: frozenset[str], in_place: bool = False, goes_on: bool = False
    ) -> Iterator[Part]:
        """The parts of a text in order: where each begins, and its id if it is an added word or a control token.

        As in transformers: tokens that are not normalized are found first, and the others in what is left, after it is
        normalized; of several the one that begins first, and of those the longest. A control token that is not allowed
        hides what it overlaps. White space that a token before it takes is still a part of one that begins with it.

        Raises:
            TokenizerError: parts have to be `in_place`, and a normalizer changes the text.
        """
        if not isinstance(text, GuardedText):
            yield from self._all_found(Part(0, text, None, goes_on), allowed, in_place)
            return
        done = 0
        for number, (start, stop) in enumerate([*text.spans, (len(text), len(text))]):
            yield from self._all_found(Part(done, text[done:start], None, number > 0), allowed, in_place)
            if start < stop:
                yield from self._normalized(iter([Part(start, text[start:stop], None, True)]), in_place)
            done = stop

    def _all_found(self, part: Part, allowed: frozenset[str], in_place: bool) -> Iterator[Part]:
        parts = iter([part] if part.text else [])
        is_normalized = not self.steps.change_texts
        for finder in self.finders():
            if finder.late and not is_normalized:
                parts, is_normalized = self._normalized(parts, in_place), True
            parts = self._searched(parts, finder, allowed)
        return parts if is_normalized else self._normalized(parts, in_place)

    def _normalized(self, parts: Iterator[Part], in_place: bool) -> Iterator[Part]:
        for part in parts:
            text = part.text if part.id is not None else self.steps.normalized(part.text)
            if in_place:
                self.steps.check_places(part.text, text)
            if text:
                yield part._replace(text=text)

    def _searched(self, parts: Iterator[Part], finder: Finder, allowed: frozenset[str]) -> Iterator[Part]:
        for part in parts:
            if part.id is None:
                yield from self._found(part, finder, allowed)
            else:
                yield part

    def _found(self, part: Part, finder: Finder, allowed: frozenset[str]) -> Iterator[Part]:
        first, text, _, goes_on = part
        done = 0
        for match in finder.pattern.finditer(text):
            token, start, stop = self.tokens[finder.names[match[0]]], match.start(), match.end()
            if token.special and token.content not in allowed:
                continue
            if token.single_word and touches_word(text, start, stop):
                continue
            while token.lstrip and start > done and text[start - 1] in white_space():
                start -= 1
            while token.rstrip and stop < len(text) and text[stop] in white_space():
                stop += 1
            start = max(start, done) if token.lstrip else start
            if start > done:
                yield Part(first + done, text[done:start], None, goes_on and not done)
            if start < stop:  # or a token before it took all of it
                yield Part(first + start, text[start:stop], self.ids[token.content])
                done = stop
        if done < len(text):
            yield Part(first + done, text[done:] if done else text, None, goes_on and not done)

    def groups(self) -> list[list[str]]:
        """The tokens as they are searched for, group after group, the longest first; none is empty."""
        names = sorted(self.tokens, key=len, reverse=True)
        groups = ([name for name in names if self.tokens[name].is_normalized == late] for late in (False, True))
        return [group for group in groups if group]

    def finders(self) -> list[Finder]:
        """What finds the tokens of each group."""
        if self._finders is None:
            self._finders = [self._finder(group) for group in self.groups()]
        return self._finders

    def _finder(self, group: list[str]) -> Finder:
        late = self.tokens[group[0]].is_normalized
        names = {(self.steps.normalized(name) if late else name): name for name in reversed(group)}
        names.pop("", None)
        return Finder(re.compile(any_of(list(names)) if names else "(?!)"), names, late)


def any_of(names: list[str], depth: int = 0) -> str:
    """A pattern for the longest of these texts: by their first characters, or thousands would be tried one by one."""
    if len(names) < BRANCHES or depth == DEPTH:
        return "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    rests: dict[str, list[str]] = {}
    for name in sorted(names, reverse=True):  # the empty one last
        rests.setdefault(name[:1], []).append(name[1:])
    return "|".join(f"{re.escape(head)}(?:{any_of(rest, depth + 1)})" if head else "" for head, rest in rests.items())


def touches_word(text: str, start: int, stop: int) -> bool:
    """Whether a character of a word stands beside a span of a text."""
    return any(map(is_of_word, text[max(start - 1, 0) : start] + text[stop : stop + 1]))


def is_of_word(char: str) -> bool:
    """Whether a character is one of those that \\w means where it follows Unicode."""
    if category(char)[0] in "LM" or category(char) in ("Nd", "Nl", "Pc"):
        return True
    return char in JOINERS or any(ord(char) in span for span in CIRCLED)


@lru_cache(maxsize=1)
def white_space() -> frozenset[str]:
    """The characters that lstrip and rstrip take."""
    return frozenset(chr(at) for low, high in code_point_classes()["space"] for at in range(low, high + 1))
