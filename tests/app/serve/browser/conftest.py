"""The page in a browser: these tests are collected where GPT2_MULTI_CHROMIUM names one, as the session `page` does."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = os.environ.get("GPT2_MULTI_CHROMIUM", "")
collect_ignore_glob = [] if CHROMIUM else ["*.py"]

if CHROMIUM:
    from playwright.sync_api import Browser, Page, Route, sync_playwright

    from tests.app.serve.browser.pen import PHONE, Pen
    from tests.app.serve.browser.serving import serving

HARMLESS = re.compile(r"Failed to load resource")  # what the browser notes of each refusal that a test asks for


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A server of the demo model."""
    if os.environ.get("DEVADDR"):
        yield os.environ["DEVADDR"]
        return
    with serving() as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Callable[..., Pen]]:
    """Opens the page; in the end, nothing may have left the machine, failed, or been refused by the policy."""
    requests: list[str] = []
    faults: list[str] = []
    contexts = []

    def note(page: Page) -> None:
        page.on("pageerror", lambda error: faults.append(f"{error}\n{error.stack}"))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("dialog", lambda dialog: faults.append(dialog.message))

    def opening(url: str = address, **options: Any) -> Pen:
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        context.on("request", lambda request: requests.append(request.url))
        context.on("page", note)
        contexts.append(context)
        return Pen(context.new_page(), url)

    yield opening
    for context in contexts:
        context.close()
    assert requests and all(url.startswith((address, "data:", "blob:")) for url in requests)
    assert not [fault for fault in faults if not HARMLESS.match(fault)]


@pytest.fixture
def pen(opened: Callable[..., Pen]) -> Pen:
    """The page on a large screen."""
    return opened(viewport={"width": 1100, "height": 760})


@pytest.fixture
def phone(opened: Callable[..., Pen]) -> Pen:
    """The page on a small one, which is touched."""
    return opened(**PHONE)


@pytest.fixture
def model(pen: Pen) -> Model:
    """A model whose answers a test writes."""
    return Model(pen)


class Model:
    """Answers in the server's place: texts are choices, each character group one token; or a status and a message."""

    def __init__(self, pen: Pen) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answers: list[Any] = []
        self.seconds = 0.0
        pen.page.route("**/v1/completions", self._answer)

    def _answer(self, route: Route) -> None:
        self.asked.append(json.loads(route.request.post_data or ""))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        time.sleep(self.seconds)
        if answer == "gone":
            route.abort("connectionrefused")
        elif isinstance(answer, list):
            length = len(self.asked[-1]["prompt"])
            choices = [choice(index, tokens, length) for index, tokens in enumerate(answer)]
            route.fulfill(body=stream(choices), content_type="text/event-stream")
        else:
            status, body, headers = (*answer, {})[:3]
            route.fulfill(status=status, body=body if isinstance(body, str) else json.dumps(body), headers=headers)


def stream(choices: list[dict[str, Any]]) -> str:
    """An answer as server-sent events."""
    events = [*({"choices": [choice], "seed": 11} for choice in choices), TALLY]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


TALLY = {"choices": [], "seed": 11, "usage": {"prompt_tokens": 3}}


def choice(index: int, tokens: list[str], start: int) -> dict[str, Any]:
    """A choice as the server spells it: offsets are in characters, not in halves of them."""
    offsets = [start + len("".join(tokens[:place])) for place in range(len(tokens))]
    tops = [{token: -0.5, " other": -1.5, "\n": -3.0} for token in tokens]
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return {"index": index, "text": "".join(tokens), "logprobs": logprobs, "finish_reason": "length"}
