"""What a tokenizer.json does to a text before its words are merged: normalizers, and cuts beyond GPT-2's own.

What is not among them is refused by name, for it would give other ids.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.files.patterns import GPT2_PATTERNS, numbers, pattern_of, spaces

Normalizer = Callable[[str], str]
Part = tuple[int, str]  # of a text: where it begins, and what it is
Match = tuple[int, int, bool]  # of a pattern: from, to, and whether it is one or what lies between two


@dataclass(frozen=True)
class Steps:
    """The steps before the merges, as JSON, so that they can be pickled and written; without any, GPT-2's own.

    normalizer: the list of them. cuts: the pre-tokenizers before ByteLevel. use_regex: whether what they leave is cut
    into words by GPT-2's pattern.
    """

    normalizers: str = "[]"
    cuts: str = "[]"
    use_regex: bool = True

    @classmethod
    def of(cls, normalizer: Any, pre_tokenizer: Any) -> tuple["Steps", bool]:
        """The steps that tokenizer.json describes, and whether a space is put before each part.

        Raises:
            TokenizerError: one of them is not known here.
        """
        normalizers = flat(normalizer, "normalizers")
        *cuts, level = flat(pre_tokenizer, "pretokenizers") or [{"type": None}]
        if (kind := level.get("type")) != "ByteLevel":
            found = f"{kind!r} as the last" if cuts else repr(kind)
            raise TokenizerError(f"expected pre_tokenizer.type to be 'ByteLevel', found {found}; {ELSEWHERE}")
        regex, prefix = bool(level.get("use_regex", True)), bool(level.get("add_prefix_space", True))
        if len(cuts) == 1 and is_gpt2(cuts[0]) and not regex and not prefix:
            cuts, regex = [], True
        steps = cls(json.dumps(normalizers), json.dumps(cuts), regex)
        steps.normalized("")
        steps.parts("")
        return steps, prefix

    @property
    def are_gpt2(self) -> bool:
        """Whether they are GPT-2's own."""
        return self == Steps()

    @property
    def digits(self) -> bool | None:
        """Whether digits are cut apart each for itself, or from what is no digit; None where they are not."""
        cuts = json.loads(self.cuts)
        return bool(cuts[-1].get("individual_digits")) if cuts else None

    def refuse_in_graph(self) -> None:
        """Only digits can be cut apart in a graph.

        Raises:
            TokenizerError: another step is there.
        """
        cuts = json.loads(self.cuts)
        found = [*self._kinds, *(step["type"] for step in cuts if step["type"] != "Digits")]
        if found or len(cuts) > 1:
            raise TokenizerError(
                f"tokenizer: {', '.join(found or ['Digits twice'])} of its tokenizer.json is not there in a graph; "
                "encode texts with GPT2Tokenizer, and give the model ids"
            )

    @property
    def change_texts(self) -> bool:
        """Whether there is a normalizer."""
        return self.normalizers != "[]"

    def check_places(self, text: str, read: str) -> None:
        """Refuse to say where in a text its tokens are, when it was changed before it was read.

        Raises:
            TokenizerError: it was, and its characters may be in other places.
        """
        if text != read and (len(text) != len(read) or set(self._kinds) != {"Lowercase"}):
            raise TokenizerError(
                f"return_offsets_mapping: expected a text that {', '.join(self._kinds)} of tokenizer.json leaves as it "
                f"is, found {text[:40]!r}; normalize it before, or do not ask where its tokens and words are"
            )

    @property
    def _kinds(self) -> list[str]:
        return [step["type"] for step in json.loads(self.normalizers)]

    def normalized(self, text: str) -> str:
        """A text as it is read."""
        for step in _normalizers(self.normalizers):
            text = step(text)
        return text

    def parts(self, text: str) -> list[Part]:
        """The parts of a normalized text, out of which no word reaches."""
        parts: list[Part] = [(0, text)]
        if self.cuts == "[]":
            return parts
        for apart in _cuts(self.cuts):
            parts = [(start + at, piece) for start, whole in parts for at, piece in apart(whole)]
        return parts

    def to_json(self, prefix: bool) -> dict[str, Any]:
        """What tokenizer.json says of them."""
        level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": False, "use_regex": self.use_regex}
        normalizers, cuts = json.loads(self.normalizers), json.loads(self.cuts)
        return {
            "normalizer": joined("normalizers", normalizers) if normalizers else None,
            "pre_tokenizer": joined("pretokenizers", [*cuts, level]),
        }


GPT2_STEPS = Steps()


def joined(name: str, steps: Sequence[Any]) -> Any:
    """Steps as tokenizer.json has them: one alone, or a sequence."""
    return steps[0] if len(steps) == 1 else {"type": "Sequence", name: list(steps)}


def flat(step: Any, name: str) -> list[Any]:
    """The steps of a step that may be a sequence of others, or none."""
    if step is None:
        return []
    return [inner for part in step[name] for inner in flat(part, name)] if step["type"] == "Sequence" else [step]


def is_gpt2(step: Mapping[str, Any]) -> bool:
    """Whether a step cuts as GPT-2's own pattern does, which leaves nothing between its words."""
    behavior, inverted = step.get("behavior"), bool(step.get("invert"))
    is_whole = behavior == "Isolated" or (behavior == "Removed" and inverted)
    return step["type"] == "Split" and step["pattern"].get("Regex") in GPT2_PATTERNS and is_whole


# --- normalizers -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _normalizers(steps: str) -> list[Normalizer]:
    return [_normalizer(step) for step in json.loads(steps)]


def _normalizer(step: Mapping[str, Any]) -> Normalizer:
    kind = step["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return partial(unicodedata.normalize, kind)
    if kind == "Lowercase":
        return lambda text: "".join(map(str.lower, text))  # one by one: a sigma at the end of a word is no other
    if kind == "Prepend":
        prefix = _text(step["prepend"])
        return lambda text: prefix + text if text else text
    if kind == "Replace":
        pattern, content = _pattern(step["pattern"]), _text(step["content"])
        return lambda text: pattern.sub(lambda _: content, text)
    if kind == "Strip":
        left, right = (f"[{spaces()}]" if step[f"strip_{side}"] else "(?!)" for side in ("left", "right"))
        ends = re.compile(rf"\A{left}+|{right}+\Z")
        return lambda text: ends.sub("", text)
    raise TokenizerError(f"expected a normalizer that is known here, found {kind!r}; {ELSEWHERE}")


# --- pre-tokenizers --------------------------------------------------------------------------------------------------

ELSEWHERE = (
    "load it with transformers' AutoTokenizer, which generate, score and pipeline take too, or leave it out of the file"
)


@lru_cache(maxsize=16)
def _cuts(steps: str) -> list[Callable[[str], list[Part]]]:
    return [_cut(step) for step in json.loads(steps)]


def _cut(step: Mapping[str, Any]) -> Callable[[str], list[Part]]:
    kind = step["type"]
    if kind == "Digits":
        behavior = "Isolated" if step.get("individual_digits") else "Contiguous"
        return partial(cut, re.compile(f"[{numbers()}]"), behavior, False)
    if kind == "Split" and step["behavior"] in BEHAVIORS:
        return partial(cut, _pattern(step["pattern"]), step["behavior"], bool(step.get("invert")))
    raise TokenizerError(f"expected a pre_tokenizer that is known here, found {kind!r}; {ELSEWHERE}")


def _pattern(step: Mapping[str, Any]) -> re.Pattern[str]:
    if "String" in step:
        return re.compile(re.escape(_text(step["String"])) or "(?!)")
    return pattern_of(_text(step["Regex"]))


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise TokenizerError(f"expected a text in a part of tokenizer.json, found {given!r}; mend the file")
    return given


def cut(pattern: re.Pattern[str], behavior: str, inverted: bool, text: str) -> list[Part]:
    """The parts of a text about the matches of a pattern, as `behavior` says of a match."""
    matches, done = [], 0
    for match in pattern.finditer(text):
        matches += [(done, match.start(), inverted), (match.start(), match.end(), not inverted)]
        done = match.end()
    matches = [row for row in (*matches, (done, len(text), inverted)) if row[0] < row[1]]
    return [(start, text[start:stop]) for start, stop, _ in BEHAVIORS[behavior](matches)]


def _contiguous(matches: list[Match]) -> list[Match]:
    groups = (list(group) for _, group in groupby(matches, key=lambda row: row[2]))
    return [(group[0][0], group[-1][1], group[0][2]) for group in groups]


def _with_previous(matches: list[Match]) -> list[Match]:
    made: list[Match] = []
    before = False
    for start, stop, is_match in matches:
        if is_match and not before and made:
            made[-1] = (made[-1][0], stop, False)
        else:
            made.append((start, stop, False))
        before = is_match
    return made


def _with_next(matches: list[Match]) -> list[Match]:
    turned = _with_previous([(-stop, -start, is_match) for start, stop, is_match in reversed(matches)])
    return [(-stop, -start, is_match) for start, stop, is_match in reversed(turned)]


BEHAVIORS: dict[str, Callable[[list[Match]], list[Match]]] = {
    "Isolated": lambda matches: matches,
    "Removed": lambda matches: [row for row in matches if not row[2]],
    "MergedWithPrevious": _with_previous,
    "MergedWithNext": _with_next,
    "Contiguous": _contiguous,
}
