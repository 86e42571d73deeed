"""Where the data lies that is too large, or not ours, to be in the repository."""

import os
from pathlib import Path

import pytest


def shared(*parts: str) -> Path:
    """A path in ../shared, or in GPT2_MULTI_SHARED; without such a folder the test is skipped."""
    root = Path(os.environ.get("GPT2_MULTI_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    if not root.is_dir():
        pytest.skip(f"the shared data is not there: no folder {root} (GPT2_MULTI_SHARED names another)")
    return root.joinpath(*parts)
