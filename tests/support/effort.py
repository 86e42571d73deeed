"""How much the tests try: `nox -s thorough` tries all of it, with all optimisations; `nox -s tests` a part."""

import os

THOROUGH = os.environ.get("GPT2_MULTI_THOROUGH") == "1"


def some(everything: int, part: int) -> int:
    """A number of cases, or the step between them: one where everything is tried, one where a part is."""
    return everything if THOROUGH else part
