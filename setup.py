"""The long description: README.md, with links that lead to the repository from wherever it is read."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ADDRESS = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
README = (HERE / "README.md").read_text("utf-8")


def lead(link: re.Match[str]) -> str:
    """A link to a file of the repository, or to the picture that it is."""
    return f"{link[0]}{ADDRESS}/{'raw' if link[1] else 'blob'}/main/"


setup(
    long_description=re.sub(r"(!?)\[[^\]]*\]\((?!https?://|#)", lead, README),
    long_description_content_type="text/markdown",
)
