"""The documentation is true: its Python runs, its commands work, its links lead somewhere, and Sphinx agrees.

The blocks of a page run in order, as one program, in an empty folder. A comment behind a `print` is what it prints.
"""

import contextlib
import gc
import importlib.util
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpt2_multi.app import cli
from gpt2_multi.files import hub
from tests.support.effort import THOROUGH

ROOT = Path(__file__).resolve().parents[3]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)
# Whose time goes to compiling one layer after the other, and which prints what is true of any number of layers.
SHALLOW = () if THOROUGH else ("README.md", "docs/keras.md")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page, language):
    return [code for kind, code in BLOCK.findall(PAGES[page].read_text("utf-8")) if kind == language]


def pages_with(language, text=""):
    return [page for page in PAGES if any(text in code for code in blocks(page, language))]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")  # in Keras' savers
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")  # of which devices have another
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, shallow, monkeypatch):
    for framework in ("torch", "tensorflow", "flax"):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    if page in SHALLOW:
        monkeypatch.setattr(hub, "DEMO", shallow)
    names = {}
    gc.freeze()  # what was imported just now: Keras collects garbage for every variable that is deleted
    for code in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page, "exec"), names)
        gc.freeze()
        expected = PRINTED.findall(code)
        assert printed.getvalue().splitlines() == expected or not expected, code


@pytest.mark.parametrize("page", pages_with("sh", "gpt2-multi "))
def test_the_commands_of_a_page_work(page, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    shutil.copytree(hub.DEMO, tmp_path / "old-model")
    monkeypatch.chdir(tmp_path)
    lines = [line for code in blocks(page, "sh") for line in code.splitlines() if line.startswith("gpt2-multi ")]
    assert lines
    for line in lines:
        result = CliRunner().invoke(cli.main, shlex.split(line)[1:])
        assert (result.exit_code, result.stderr) == (0, "") and result.stdout.strip(), (line, result.output)


@pytest.mark.parametrize("page", pages_with("console", "gpt2"))
def test_the_commands_that_a_page_shows_have_these_options(page):
    shown = re.findall(r"^\$ .*gpt2[-_]multi (.*)$", "\n".join(blocks(page, "console")), re.MULTILINE)
    for name, *arguments in map(shlex.split, shown):
        command = cli.main.get_command(None, name)
        assert command.make_context(name, arguments).params, (name, arguments)


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file(page):
    links = [link for link in LINK.findall(PAGES[page].read_text("utf-8")) if "://" not in link]
    missing = [link for link in links if not (PAGES[page].parent / link.partition("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_the_sessions_that_a_page_names_exist(page):
    file = (ROOT / "noxfile.py").read_text("utf-8")
    sessions = re.findall(r"^@nox\.session(?:\(.*\))?\ndef (\w+)", file, re.MULTILINE)
    named = re.findall(r"nox -s (\w+)", PAGES[page].read_text("utf-8"))
    assert set(named) <= set(sessions)


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text("utf-8").splitlines()
    assert {Path(page).stem for page in PAGES if page.startswith("docs/")} - {"index"} <= set(contents)


@pytest.mark.filterwarnings("ignore")  # of Python, about Sphinx' own code; those of Sphinx are errors
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "furo", "myst_parser", "torch", "flax"))),
    reason="Sphinx, or what it documents, is not installed",
)
def test_sphinx_builds_the_pages_without_a_warning(tmp_path):
    from sphinx.cmd.build import main

    with contextlib.redirect_stderr(io.StringIO()) as said:  # what the pages document is imported here already
        failed = main(["-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path / "html")])
    assert not failed, said.getvalue()
    assert "GPT2LMHeadModel" in (tmp_path / "html" / "api.html").read_text("utf-8")
