"""The long description: README.md, with links that lead to the repository from wherever it is read."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ADDRESS = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
README = (HERE / "README.md").read_text("utf-8")

setup(
    long_description=re.sub(r"\]\((?!https?://|#)", f"]({ADDRESS}/blob/main/", README),
    long_description_content_type="text/markdown",
)
