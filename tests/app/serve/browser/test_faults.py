"""What goes wrong is one sentence, and text stays text."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.app.serve.browser.conftest import Model
from tests.app.serve.browser.pen import Pen

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "</textarea><iframe srcdoc='<script>parent.alert(1)</script>'>",
    "javascript:alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    "__proto__",
    "\u202eevil\u2066\u0000\ud7ff",
]


def refusal(message: str, code: str | None = None) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": message, "code": code}}


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((400, refusal("temperature: expected less")), r"Temperature: expected less\."),
        ((429, refusal("busy"), {"retry-after": "1"}), r"The server is busy; ask again in a second\."),
        ((429, refusal("busy"), {"retry-after": "20"}), r"The server is busy; ask again in 20 seconds\."),
        ((500, "<h1>oops</h1>"), r"Status 500\."),
        ((504, refusal("the time was over")), r"The time was over\."),
        ((200, "{"), r"The server's answer is no completion\."),
        ((200, {"choices": 3}), r"The server's answer is no completion\."),
        ("gone", "The server does not answer"),
    ],
    ids=str,
)
def test_what_goes_wrong_is_one_sentence(pen: Pen, model: Model, answer: object, sentence: str) -> None:
    model.answers = [answer, [[" well"]]]
    pen.write("All is")
    pen.press("Tab")
    pen.say(f"^!?{sentence}")
    expect(pen.notice).to_have_class("error")
    pen.dropped()
    assert pen.text == "All is"
    pen.ask()
    expect(pen.notice).not_to_have_class("error")
    pen.press("Tab")
    assert pen.text == "All is well"


def test_a_text_that_is_too_long_is_asked_for_shorter_and_not_for_ever(pen: Pen, model: Model) -> None:
    model.answers = [(400, refusal("too long", "context_length_exceeded"))]
    pen.put("word " * 1000)
    pen.press("Tab")
    pen.say("Too long")
    lengths = [len(asked["prompt"]) for asked in model.asked]
    assert lengths == sorted(set(lengths), reverse=True) and len(lengths) == 6


def test_a_seed_that_is_none_is_said_before_anything_is_asked(pen: Pen, model: Model) -> None:
    for seed in ("1.5", "-1", "x", "9999999999999999"):
        pen.set("seed", seed)
        pen.area.press("Tab")
        pen.say("seed has to be")
        assert pen.page.locator("#seed").get_attribute("aria-invalid") == "true"
    assert not model.asked


def test_a_key_is_asked_for_and_kept_in_this_tab(pen: Pen) -> None:
    keys = []

    def guarded(route) -> None:
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json=refusal("the API key is missing or wrong"))

    pen.page.route("**/v1/**", guarded)
    pen.page.reload()
    dialog = pen.page.get_by_role("dialog", name="This server asks for its API key")
    for key in ("wrong", "sesame"):
        expect(dialog.get_by_label("API key")).to_be_focused()
        dialog.get_by_label("API key").fill(key)
        pen.press("Enter")
    expect(dialog).to_be_hidden()
    expect(pen.page.locator("#model")).to_have_text("demo")
    pen.write("ROMEO:")
    pen.ask()
    assert keys == [None, "Bearer wrong", "Bearer sesame", "Bearer sesame"]
    assert "sesame" in pen.page.evaluate("JSON.stringify(sessionStorage)")
    assert "sesame" not in pen.page.evaluate("JSON.stringify(localStorage) + location + document.cookie")


def test_a_link_brings_a_key_and_nobody_else_sees_it(pen: Pen, address: str) -> None:
    keys = []

    def noted(route) -> None:
        keys.append(route.request.headers.get("authorization"))
        route.continue_()

    pen.page.route("**/v1/**", noted)
    pen.page.goto("about:blank")
    pen.page.goto(f"{address}/#key=se%26+same")
    expect(pen.page.locator("#model")).to_have_text("demo")
    assert keys == ["Bearer se&+same"] and pen.page.url == f"{address}/"


def test_a_model_that_still_loads_is_waited_for(pen: Pen) -> None:
    answers = [503, 503]

    def loading(route) -> None:
        if not answers:
            return route.continue_()
        route.fulfill(status=answers.pop(), json=refusal("the server is loading; ask again later"))

    pen.page.route("**/v1/models", loading)
    pen.page.reload()
    pen.say("The server is loading")
    expect(pen.notice).to_have_text("")
    expect(pen.page.locator("#model")).to_have_text("demo")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_never_becomes_markup(pen: Pen, model: Model, text: str) -> None:
    before = pen.page.evaluate("document.querySelectorAll('*').length")
    model.answers = [[[" ", text], [text], ["\n", text, "x"]]]
    pen.put(text)
    pen.ask()
    assert model.asked[0]["prompt"] == pen.text
    pen.press("ArrowUp", "Enter")
    assert pen.text == f"{text}\n{text}x".replace("\r", "\n")
    pen.point(pen.marks.nth(1))
    pen.offered()
    pen.page.mouse.move(1, 1)
    pen.dropped()
    assert pen.marks.all_text_contents() == ["\n", text, "x"]
    pen.page.reload()
    expect(pen.area).to_have_value(f"{text}\n{text}x")
    assert not pen.page.locator("body :is(img, script, iframe, svg)").count()
    assert pen.page.evaluate("document.querySelectorAll('*').length") == before + 3


def test_a_refusal_never_becomes_markup(pen: Pen, model: Model) -> None:
    model.answers = [(400, refusal(HOSTILE[0]))]
    pen.write("x")
    pen.press("Tab")
    pen.say(re.escape(HOSTILE[0]))
    assert not pen.page.locator("img").count()


def test_what_is_pasted_is_plain(pen: Pen) -> None:
    pen.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    pen.page.evaluate(
        """navigator.clipboard.write([new ClipboardItem({
          "text/html": new Blob(["<b>bold</b><img src=x>"], {type: "text/html"}),
          "text/plain": new Blob(["bold"], {type: "text/plain"}),
        })])"""
    )
    pen.area.press("Control+v")
    expect(pen.area).to_have_value("bold")
    assert not pen.page.locator("img, b").count()


def test_the_policy_is_strict(pen: Pen, address: str) -> None:
    response = pen.page.request.get(address)
    directives = [part.strip() for part in response.headers["content-security-policy"].split(";")]
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(directives)
    assert "unsafe" not in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "kept", ['{"text": 5, "marks": "x"}', "[", "null", '{"text": "a", "marks": [{"start": -1}, null]}']
)
def test_whatever_the_browser_kept_the_page_begins(pen: Pen, kept: str) -> None:
    pen.page.evaluate("kept => { localStorage['gpt2-multi:text'] = localStorage['gpt2-multi:settings'] = kept }", kept)
    pen.page.reload()
    expect(pen.page.locator("#model")).to_have_text("demo")
    pen.write("ROMEO:")
    pen.ask()


def test_a_browser_without_room_says_so(pen: Pen) -> None:
    pen.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') } }"
    )
    pen.write("x")
    pen.say("no room")
