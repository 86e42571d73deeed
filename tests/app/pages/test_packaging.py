"""What is published: a source package has all that a contributor needs, and a page whose links lead somewhere."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[3]
LOCAL = (".git", ".nox", ".venv", ".*_cache", ".hypothesis", "__pycache__", "_build", "runs")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The source package, built as pip builds it, unpacked."""
    source = tmp_path_factory.mktemp("package") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LOCAL))
    build = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(source / "out", filter="data")
    (folder,) = (source / "out").iterdir()
    return folder


@pytest.mark.parametrize("kept", ["docs", "examples", "tests", "benchmarks", ".ci", "conversion", "gpt2_multi"])
def test_the_source_package_has_whole_folders(package, kept):
    here = {path.relative_to(ROOT) for path in (ROOT / kept).rglob("*") if path.is_file()}
    local = {path for path in here if set(LOCAL) & set(path.parts)}
    there = {path.relative_to(package) for path in (package / kept).rglob("*") if path.is_file()}
    assert there >= here - local
    assert (package / "noxfile.py").is_file() and (package / "LICENSE").is_file()


def test_the_page_of_the_package_links_to_the_repository(package):
    page = email.message_from_string((package / "PKG-INFO").read_text("utf-8"))
    address = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
    links = LINK.findall(page.get_payload())
    inside = [re.sub(f"{address}/(blob|raw)/main/", "", link).partition("#")[0] for link in links if address in link]
    assert page["Description-Content-Type"] == "text/markdown"
    assert all(link.startswith("https://") for link in links) and len(inside) > 10
    assert all((ROOT / path).is_file() for path in inside)
    assert f"Repository, {address}" in page.get_all("Project-URL")
