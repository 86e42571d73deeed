"""Who can write here: with keys alone, with a screen reader, in the dark, on a phone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.app.serve.browser.conftest import Model
from tests.app.serve.browser.pen import PHONE, Pen

AXE = os.environ.get("GPT2_MULTI_AXE", "")  # the file axe.min.js
SMALLEST = 24  # CSS pixels of what is touched: WCAG 2.2, 2.5.8


def states(pen: Pen) -> None:
    """Go through what the page can look like, and stop at each."""
    yield "empty"
    pen.write("ROMEO:\nWhat say you")
    pen.ask()
    yield "suggestions"
    pen.press("Enter", "Alt+ArrowDown")
    pen.offered()
    yield "alternatives"
    pen.press("Escape")
    pen.set("seed", "x")
    yield "a fault"
    tune = pen.page.get_by_role("button", name="Settings")
    tune.click()
    yield "without settings, or with them"
    tune.click()
    pen.page.get_by_role("button", name="Help").click()
    yield "help"
    pen.press("Escape")
    pen.page.evaluate("document.getElementById('ask-key').showModal()")
    yield "key"


if AXE:

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("size", [{"viewport": {"width": 1100, "height": 760}}, PHONE], ids=["desk", "phone"])
    def test_axe_finds_nothing(opened: Callable[..., Pen], scheme: str, size: dict) -> None:
        pen = opened(color_scheme=scheme, reduced_motion="reduce", **size)
        pen.page.evaluate(Path(AXE).read_text("utf-8"))
        for state in states(pen):
            found = pen.page.evaluate(
                "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa', 'best-practice']})"
            )
            told = [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]]
            assert not told, (state, told)


def test_a_screen_reader_hears_what_is_offered(pen: Pen, model: Model) -> None:
    model.answers = [[[" one"], [" two", "\n"], [" three"]]]
    expect(pen.area).to_have_role("textbox")
    expect(pen.area).to_have_accessible_name("Your text")
    pen.write("x")
    pen.ask()
    pen.say("^3 suggestions")
    expect(pen.page.get_by_role("listbox")).to_have_accessible_name("3 suggestions")
    for key, name in (("ArrowDown", "two"), ("ArrowDown", "three"), ("ArrowDown", "one"), ("ArrowUp", "three")):
        pen.press(key)
        active = pen.page.locator(f"#{pen.area.get_attribute('aria-activedescendant')}")
        expect(active).to_have_accessible_name(name)
        expect(active).to_have_attribute("aria-selected", "true")
        assert pen.page.locator("[aria-selected=true]").count() == 1
    pen.press("Escape")
    assert pen.area.get_attribute("aria-activedescendant") is None


def test_nobody_is_caught_in_the_text(pen: Pen) -> None:
    pen.area.focus()
    pen.press("Escape")
    pen.say("Tab now leaves")
    pen.press("Tab")
    expect(pen.page.get_by_role("button", name="Suggest")).to_be_focused()
    pen.press("Shift+Tab")
    expect(pen.area).to_be_focused()
    pen.press("Shift+Tab")
    expect(pen.area).not_to_be_focused()


def test_all_is_reached_by_keys(pen: Pen) -> None:
    controls = pen.page.locator("button:visible, input:visible, textarea:visible")
    seen = set()
    pen.page.locator("body").evaluate("body => { document.activeElement.blur() }")
    for _ in range(controls.count() + 2):
        if pen.page.evaluate("document.activeElement.id") == "text":
            pen.press("Escape")
        pen.press("Tab")
        seen.add(pen.page.evaluate("document.activeElement.id"))
        outline = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert pen.page.evaluate(f"document.activeElement === document.body || {outline}")
    assert seen >= set(controls.evaluate_all("found => found.map(element => element.id).filter(id => id !== 'keep')"))


def test_keys_of_an_input_method_are_its_own(pen: Pen, model: Model) -> None:
    model.answers = [[[" x"]]]
    pen.write("a")
    client = pen.page.context.new_cdp_session(pen.page)
    client.send("Input.imeSetComposition", {"text": "か", "selectionStart": 1, "selectionEnd": 1})
    pen.area.evaluate(
        "area => area.dispatchEvent(new KeyboardEvent('keydown', {key: 'Tab', isComposing: true, bubbles: true}))"
    )
    client.send("Input.insertText", {"text": "蚊"})
    assert pen.text == "a蚊" and not model.asked


def test_a_phone(phone: Pen) -> None:
    for state in states(phone):
        wide = phone.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, state
        for control in phone.page.locator("button:visible, [role=option]:visible").all():
            box = control.bounding_box()
            assert (
                box
                and min(box["width"], box["height"]) >= SMALLEST
                and box["x"] >= 0
                and box["x"] + box["width"] <= 360
            )


def test_touching_does_what_keys_do(phone: Pen) -> None:
    phone.area.tap()
    phone.page.keyboard.insert_text("ROMEO:\nWhat say you")
    phone.page.get_by_role("button", name="Suggest").tap()
    phone.offered()
    expect(phone.area).to_be_focused()  # or its keyboard would go
    phone.options.nth(1).tap()
    expect(phone.area).to_be_focused()
    text = phone.text
    assert text.startswith("ROMEO:\nWhat say you") and phone.marks.count()
    x, y = phone.centre(phone.marks.nth(1))
    phone.page.touchscreen.tap(x, y)
    phone.offered()
    other = phone.options.filter(has_not=phone.page.locator("[aria-current]")).nth(2)
    other.tap()
    phone.offered()
    assert phone.text != text
    phone.page.get_by_role("button", name="Undo").tap()
    assert phone.text == text


@pytest.mark.parametrize("height", [760, 360], ids=["desk", "above a keyboard"])
@pytest.mark.parametrize("lines", [1, 9, 60])
def test_what_is_offered_is_seen(opened: Callable[..., Pen], height: int, lines: int) -> None:
    pen = opened(viewport={"width": 400, "height": height})
    pen.put("ROMEO:\n" * lines)
    pen.ask()
    footer, popup = pen.page.locator("footer").bounding_box(), pen.page.locator("#popup").bounding_box()
    assert footer and popup and popup["y"] + popup["height"] <= footer["y"] + 1 and footer["y"] < height
    assert pen.options.first.bounding_box()["y"] >= 0
    pen.press("Escape")
    assert pen.page.locator(".sheet").get_attribute("style") in (None, "")


def test_the_dark_is_dark(opened: Callable[..., Pen]) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme).page
        grounds.append(
            page.evaluate("getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)")
        )
    assert min(grounds[0]) > 200 and max(grounds[1]) < 60


def test_who_wants_no_motion_has_none(opened: Callable[..., Pen]) -> None:
    for motion, moves in (("no-preference", True), ("reduce", False)):
        pen = opened(reduced_motion=motion)
        pen.page.route("**/v1/completions", lambda route: None)
        pen.write("x")
        pen.press("Tab")
        expect(pen.page.locator("#waiting")).to_be_visible()
        assert bool(pen.page.evaluate("document.getAnimations().length")) is moves


@pytest.mark.parametrize("size", [{"viewport": {"width": 1100, "height": 760}}, PHONE], ids=["desk", "phone"])
def test_the_mirror_lies_under_the_text(opened: Callable[..., Pen], size: dict) -> None:
    pen = opened(**size)
    texts = [
        "",
        "x",
        "x\n",
        "\n\n",
        "a b " * 200,
        "x" * 500,
        "fi ffi AVAVA " * 90,
        "\tx\ty " * 40,
        "文字" * 300,
        "word \n" * 90,
        "🎭 " * 99,
    ]
    for text in texts:
        pen.area.fill(text)
        heights = pen.page.evaluate(
            """() => { const [area, mirror] = ["text", "mirror"].map((id) => document.getElementById(id));
            return [area.scrollHeight, area.clientHeight, mirror.offsetHeight, area.offsetHeight] }"""
        )
        assert heights[0] == heights[1], (text[:9], heights)  # the mirror made room for all of it
        assert heights[2] == heights[3]
