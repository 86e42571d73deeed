r"""Regular expressions of tokenizer.json as Python's: `\p{L}`, `\p{N}` and `\s` are those of the pinned Unicode.

They are written for another engine. What surely means the same in both is taken, and anything else is refused; so is a
group that is repeated, in which a file could hide a search without end.
"""

import re
from functools import lru_cache

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.engine.words import code_point_classes, spell_ranges

# GPT-2's own pattern, as OpenAI writes it and as converters do.
GPT2_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)
CLASSES = {r"\p{L}": "letter", r"\p{N}": "number", r"\s": "space"}
OUTSIDE = re.compile(
    r"""(?P<set>\\p\{[LN]\}|\\[sS]|\\P\{[LN]\})|(?P<open>\[\^?)
    |(?P<same>\((?:\?(?:[:=!]|i:|<[=!]))?|\)(?![*+{])|[|.*+?]|\{\d+(?:,\d*)?\}(?![+?])
    |\\[rnt\\()\[\]{}.|*+?^$/'"-]|[^\\()\[\]{}.|*+?^$])""",
    re.VERBOSE | re.DOTALL,
)
INSIDE = re.compile(
    r"""(?P<set>\\p\{[LN]\}|\\s)|(?P<close>\])
    |(?P<same>(?!--|\|\||~~)(?:\\[rnt\\()\[\]{}.|*+?^$/'"-]|[^\\\[\]&^]))""",
    re.VERBOSE | re.DOTALL,
)


@lru_cache(maxsize=16)
def pattern_of(regex: str) -> re.Pattern[str]:
    """A pattern that finds in a text what `regex` finds in the engine that it is written for.

    Raises:
        TokenizerError: it has something in it that may mean another thing here.
    """
    made, at, within = "", 0, False
    while at < len(regex):
        found = (INSIDE if within else OUTSIDE).match(regex, at)
        if found is None:
            raise _refused(regex, regex[at : at + 8])
        name, text = found.lastgroup, found[0]
        if name == "set":
            made += _ranges(text) if within else f"[{'^' if text[1] in 'SP' else ''}{_ranges(_positive(text))}]"
        else:
            within = name == "open" or (within and name != "close")
            made += text
        at = found.end()
    try:
        return re.compile(made)
    except re.error as error:
        raise _refused(regex, str(error)) from None


def _positive(text: str) -> str:
    return text.replace("\\S", "\\s").replace("\\P", "\\p")


def _ranges(name: str) -> str:
    return spell_ranges(code_point_classes()[CLASSES[name]])


def numbers() -> str:
    """All digits and numbers, as they stand between the brackets of a pattern."""
    return _ranges(r"\p{N}")


def spaces() -> str:
    """All white space, likewise."""
    return _ranges(r"\s")


def _refused(regex: str, found: str) -> TokenizerError:
    return TokenizerError(
        f"expected a regular expression that means the same here, found {found!r} in {regex[:60]!r}; load the "
        "tokenizer with transformers' AutoTokenizer, which generate, score and pipeline take too"
    )
