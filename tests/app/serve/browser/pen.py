"""A hand that writes: the page as those use it who have only keys, a pointer, and what the page says."""

from __future__ import annotations

import json
import re
from typing import Any

from playwright.sync_api import Locator, Page, Response, expect

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}

# The browser does not always keep what was read as a stream: a copy of the last answer does.
KEEP = """const ask = window.fetch;
window.fetch = async (...how) => {
  const response = await ask(...how);
  window.answered = response.clone().text().catch(() => "");
  return response;
}"""


class Pen:
    """Writes on the page, and reads it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.area = page.locator("#text")
        self.options = page.get_by_role("option")
        self.notice = page.get_by_role("status")
        self.marks = page.locator("#mirror span")
        page.add_init_script(KEEP)
        page.goto(url)
        expect(page.locator("#model")).not_to_have_text("GPT-2")

    @property
    def text(self) -> str:
        """What stands there."""
        return self.area.input_value()

    def write(self, text: str) -> None:
        """Write with keys."""
        self.area.press_sequentially(text)

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        for key in keys:
            self.page.keyboard.press(key)

    def put(self, text: str) -> None:
        """Put a whole text there, as if it was pasted."""
        self.area.focus()
        self.page.keyboard.insert_text(text)

    def select(self, start: int, end: int | None = None) -> None:
        """Put the cursor somewhere, or select."""
        self.area.evaluate("(area, [start, end]) => area.setSelectionRange(start, end)", [start, end or start])

    def ask(self, by: str = "Tab") -> tuple[dict[str, Any], dict[str, Any]]:
        """Ask by a key, and wait for what is offered: what was asked, and what was answered."""
        with self.page.expect_response(lambda found: is_answer(found)) as info:
            self.press(by)
        self.offered()
        return json.loads(info.value.request.post_data or ""), joined(self.page.evaluate("answered"))

    def offered(self) -> Locator:
        """Wait for options that are whole."""
        self.options.first.wait_for()
        expect(self.page.get_by_role("listbox")).to_have_attribute("aria-busy", "false")
        return self.options

    def dropped(self) -> None:
        """Wait until nothing is offered."""
        expect(self.page.locator("#popup")).to_be_hidden()

    def set(self, name: str, value: str) -> None:
        """Set one of the settings."""
        field = self.page.locator(f"#{name}")
        field.evaluate(
            "(field, value) => { field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})) }", value
        )

    def say(self, pattern: str) -> None:
        """Wait for a sentence."""
        expect(self.notice).to_have_text(re.compile(pattern))

    def centre(self, locator: Locator) -> tuple[float, float]:
        """The middle of the first line of an element."""
        box = locator.evaluate(
            "element => { const {x, y, width, height} = element.getClientRects()[0]; "
            "return [x + width / 2, y + height / 2] }"
        )
        return box[0], box[1]

    def point(self, locator: Locator) -> None:
        """Let the pointer rest on an element that may lie below the text."""
        x, y = self.centre(locator)
        self.page.mouse.move(x - 1, y)
        self.page.mouse.move(x, y)


def joined(stream: str) -> dict[str, Any]:
    """The answer that a stream's events make together."""
    *events, last = [event.removeprefix("data: ") for event in stream.split("\n\n")[:-1]]
    assert last == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for event in map(json.loads, events):
        for piece in event["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "logprobs": {}})
            choice["text"] += piece["text"]
            for name, more in (piece["logprobs"] or {}).items():
                choice["logprobs"].setdefault(name, []).extend(more)
    return {**json.loads(events[-1]), "choices": list(choices.values())}


def is_answer(response: Response) -> bool:
    """Whether a completion was answered."""
    return response.url.endswith("/v1/completions") and response.ok
