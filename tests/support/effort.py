"""How much the tests try: `nox -s thorough` tries all of it, with all optimisations; `nox -s tests` a part."""

import os
from collections.abc import Sequence
from typing import Any

THOROUGH = os.environ.get("GPT2_MULTI_THOROUGH") == "1"


def some(everything: int, part: int) -> int:
    """A number of cases, or the step between them: one where everything is tried, one where a part is."""
    return everything if THOROUGH else part


def pairs(one: Sequence[Any], other: Sequence[Any]) -> list[tuple[Any, Any]]:
    """All pairs where everything is tried; otherwise each of either beside the first of the other."""
    return [(a, b) for a in one for b in other if THOROUGH or a is one[0] or b is other[0]]
