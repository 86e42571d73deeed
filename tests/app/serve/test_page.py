"""The files of the page: nothing from elsewhere, nothing that a strict policy refuses, no way from text to markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt2_multi.app.serve import command

PAGE = Path(__file__).resolve().parents[3] / "gpt2_multi" / "app" / "serve" / "page"
FILES = sorted(PAGE.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
LABELLED = {"input", "textarea"}


class Elements(HTMLParser):
    """The elements of a page, and the texts in scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def elements() -> Elements:
    parser = Elements()
    parser.feed((PAGE / "index.html").read_text("utf-8"))
    return parser


def test_a_strict_policy_finds_nothing_to_refuse(elements: Elements) -> None:
    assert not elements.inline
    for tag, attributes in elements.found:
        assert tag not in ("style", "base", "iframe", "object", "embed")
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert not re.search(r"(?:https?:|wss?:|src=\W?)//|@import|url\(", text)


def test_each_file_is_there_and_used(elements: Elements) -> None:
    named = {str(attributes.get(name)) for _, attributes in elements.found for name in ("src", "href")}
    imported = {name for path in SCRIPTS for name in re.findall(r'from "\./([^"]+)"', path.read_text("utf-8"))}
    used = imported | {name for name in named if name != "None" and not name.startswith("data:")}
    assert used | {"index.html"} == {path.name for path in FILES}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_text_becomes_markup_or_program(path: Path) -> None:
    ways = r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextual|DOMParser|srcdoc|parseFrom"
    programs = r"\beval\(|\bFunction\(|set(?:Timeout|Interval)\(\s*[\"'`]|javascript:|import\("
    assert not re.search(f"{ways}|setHTML|{programs}", path.read_text("utf-8"))


def test_each_control_has_a_name(elements: Elements) -> None:
    labels = {attributes.get("for") for tag, attributes in elements.found if tag == "label"}
    text = (PAGE / "index.html").read_text("utf-8")
    wrapped = set(re.findall(r'<label><input[^>]*id="([^"]+)"', text))
    for tag, attributes in elements.found:
        if tag in LABELLED:
            assert attributes["id"] in labels | wrapped


def test_each_name_of_an_element_is_there_once(elements: Elements) -> None:
    names = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    pointed = {
        name
        for _, attributes in elements.found
        for kind in ("for", "aria-describedby", "aria-labelledby", "aria-controls")
        for name in (attributes.get(kind) or "").split()
    }
    asked = set(re.findall(r'\$\("([^"]+)"\)', (PAGE / "page.js").read_text("utf-8")))
    assert len(names) == len(set(names))
    assert pointed | asked <= set(names)


def test_only_who_listens_for_others_is_told_their_link(monkeypatch: pytest.MonkeyPatch) -> None:
    with command._listener("127.0.0.1", 0) as listener:
        assert command._elsewhere(listener) == ""
    monkeypatch.setitem(command.PROBED, "0.0.0.0", "127.0.0.9")  # as if that was the way out
    with command._listener("0.0.0.0", 0) as listener:
        assert f"http://127.0.0.1:{listener.getsockname()[1]}/#key=KEY" in command._elsewhere(listener)
    monkeypatch.setitem(command.PROBED, "0.0.0.0", "::1")  # no way
    with command._listener("0.0.0.0", 0) as listener:
        assert command._elsewhere(listener) == ""
