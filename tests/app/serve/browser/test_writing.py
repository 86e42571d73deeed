"""Writing with the model: asking, choosing, taking, dropping, undoing, and what a reload finds."""

from __future__ import annotations

import json
import math
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.app.serve.browser.conftest import Model, choice, stream
from tests.app.serve.browser.pen import Pen

START = "ROMEO:\nWhat say you, my"
THREE = [[" dear", " friend"], [" lord", "?"], [" love", ",", " and", " mine"]]


@pytest.fixture
def written(pen: Pen, model: Model) -> Pen:
    """A page with a text of four tokens that the model wrote."""
    model.answers = [THREE]
    pen.write(START)
    pen.ask()
    pen.press("ArrowUp", "Enter")
    assert pen.text == f"{START} love, and mine"
    return pen


# --- the real model --------------------------------------------------------------------------------------------------


def test_tab_offers_what_the_model_goes_on_with(pen: Pen, address: str) -> None:
    pen.write(START)
    asked, answer = pen.ask()
    texts = [choice["text"] for choice in answer["choices"]]
    assert asked["prompt"] == START and asked["n"] == 3 and len(texts) == 3
    assert pen.options.count() == len(set(texts))
    pen.press("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
    assert pen.text == START + list(dict.fromkeys(texts))[1]
    pen.dropped()
    expect(pen.marks.first).to_be_attached()
    assert "".join(pen.marks.all_text_contents()) == pen.text.removeprefix(START)


def test_the_same_seed_gives_what_the_server_gives(pen: Pen, address: str) -> None:
    pen.set("seed", "7")
    pen.set("temperature", "1.2")
    pen.set("top-p", "0.5")
    pen.set("length", "9")
    pen.write(START)
    asked, answer = pen.ask()
    assert asked == {
        "prompt": START, "n": 3, "max_tokens": 9, "temperature": 1.2, "top_p": 0.5, "seed": 7, "logprobs": 5,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert [choice["text"] for choice in ask_directly(address, asked)] == [c["text"] for c in answer["choices"]]
    assert all(len(choice["logprobs"]["tokens"]) <= 9 for choice in answer["choices"])
    expect(pen.page.locator("#used-seed")).to_have_text("7")


def ask_directly(address: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices for a request that no page makes."""
    headers = {"Content-Type": "application/json"}
    whole = {name: value for name, value in asked.items() if not name.startswith("stream")}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(whole).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"]


def test_a_seed_that_was_drawn_is_shown_and_can_be_kept(pen: Pen) -> None:
    pen.write(START)
    asked, answer = pen.ask()
    pen.press("Escape")
    pen.area.press("End")
    _, other = pen.ask()
    assert "seed" not in asked and answer["seed"] != other["seed"]
    expect(pen.page.locator("#used-seed")).to_have_text(str(other["seed"]))
    pen.page.get_by_role("button", name="Keep").click()
    pen.area.focus()
    asked, answer = pen.ask()
    assert asked["seed"] == other["seed"] and answer["choices"] == other["choices"]


def test_a_text_longer_than_the_model_reads_is_cut_where_a_word_begins(pen: Pen) -> None:
    text = "Now is the winter of our discontent\nmade glorious summer by this sun of York; " * 300 + "And"
    pen.put(text)
    asked, answer = pen.ask()
    assert text.endswith(asked["prompt"]) and asked["prompt"][0] in " \nNm" and len(asked["prompt"]) > 100
    assert text[-len(asked["prompt"]) - 1] in " \n" or asked["prompt"][0] == " "
    assert 128 < answer["usage"]["prompt_tokens"] <= 256 - asked["max_tokens"]
    pen.say("from the last [0-9]+ words")


def test_a_text_without_spaces_is_cut_between_characters(pen: Pen) -> None:
    pen.put("🎭文" * 400)
    asked, answer = pen.ask()
    assert asked["prompt"].endswith("🎭文") and asked["prompt"].isprintable()
    assert answer["usage"]["prompt_tokens"] <= 256 - asked["max_tokens"]


def test_an_empty_page_can_begin_with_the_model(pen: Pen) -> None:
    pen.area.focus()
    asked, _ = pen.ask()
    assert asked["prompt"] == ""
    pen.press("Tab")
    assert pen.text


def test_percentages_are_the_models_own(pen: Pen) -> None:
    pen.write(START)
    _, answer = pen.ask()
    pen.press("Enter")
    pen.point(pen.marks.nth(1))
    pen.offered()
    top = answer["choices"][0]["logprobs"]["top_logprobs"][1]
    likeliest = sorted(top.values(), reverse=True)
    shown = [
        float(text.removesuffix(" %").removeprefix("< ")) for text in pen.page.locator(".share").all_text_contents()
    ]
    assert shown == pytest.approx([100 * math.exp(value) for value in likeliest], abs=0.5)


# --- while it is written ---------------------------------------------------------------------------------------------


class Slow:
    """A server whose answer a test writes, piece by piece."""

    def __init__(self, pen: Pen) -> None:
        self.pen = pen
        self.sent = Counter[int]()  # characters of each choice
        pen.page.evaluate(
            """() => { window.fetch = async (path, { signal }) => new Response(new ReadableStream({ start(to) {
              window.gone = false;
              window.end = () => to.close();
              window.send = (text) => to.enqueue(new TextEncoder().encode(text));
              signal.addEventListener("abort", () => { window.gone = true; to.error(signal.reason); });
            } })) }"""
        )
        pen.write("one")
        pen.press("Tab")
        expect(pen.page.locator("#waiting")).to_be_visible()

    def send(self, *pieces: tuple[int, list[str]]) -> None:
        """Send pieces, each a choice's number and its tokens."""
        for index, tokens in pieces:
            event = {"choices": [choice(index, tokens, len("one") + self.sent[index])], "seed": 5}
            self.sent[index] += len("".join(tokens))
            self.raw(f"data: {json.dumps(event)}\n\n")

    def raw(self, text: str) -> None:
        """Send a part of an answer."""
        self.pen.page.evaluate("text => send(text)", text)

    def is_left(self) -> bool:
        """Whether the page has gone."""
        return self.pen.page.evaluate("gone")


def test_suggestions_grow_in_their_places(pen: Pen) -> None:
    slow = Slow(pen)
    slow.send((1, [" two"]), (0, [" two"]))
    expect(pen.options).to_have_text(["two", "two"])
    pen.say("The model is writing")
    pen.press("ArrowDown")
    first = pen.options.first.element_handle()
    slow.send((2, [" <b>"]), (0, ["!"]), (1, []))
    expect(pen.options).to_have_text(["two", "two!", "<b>"])
    assert first.evaluate("element => element === document.querySelector('[role=option]')")  # what a finger lies on
    slow.send((1, ["!"]))
    slow.raw("data: [DONE]\n\n")
    pen.page.evaluate("end()")
    expect(pen.options).to_have_text(["two!", "<b>"])  # the same is offered once
    assert pen.page.locator("[aria-selected=true]").all_text_contents() == ["two!"]
    pen.say("^2 suggestions")
    pen.press("Tab")
    assert pen.text == "one two!" and pen.marks.all_text_contents() == [" two", "!"]


@pytest.mark.parametrize("key", ["Tab", "Escape", "x"])
def test_who_has_seen_enough_stops_it(pen: Pen, key: str) -> None:
    slow = Slow(pen)
    slow.send((0, [" two"]), (1, [" 2"]))
    expect(pen.options).to_have_text(["two", "2"])
    pen.press(key)
    pen.dropped()
    assert slow.is_left() and pen.text == {"Tab": "one two", "x": "onex"}.get(key, "one")
    expect(pen.page.get_by_role("button", name="Suggest")).to_be_visible()


@pytest.mark.parametrize(
    ("last", "sentence"),
    [("", r"The server's answer broke off\."), ('data: {"error": {"message": "too late"}}\n\n', r"Too late\.")],
)
def test_what_came_before_a_fault_can_be_taken(pen: Pen, last: str, sentence: str) -> None:
    slow = Slow(pen)
    slow.send((0, [" two"]))
    slow.raw(last)
    pen.page.evaluate("end()") if not last else None
    pen.say(sentence)
    pen.offered()
    pen.press("Enter")
    assert pen.text == "one two"


def test_the_likeliest_is_asked_for_once(pen: Pen, model: Model) -> None:
    model.answers = [[[" x"]]]
    pen.set("temperature", "0")
    pen.write("one")
    pen.ask()
    assert model.asked[0]["n"] == 1 and pen.options.count() == 1


# --- choosing and dropping -------------------------------------------------------------------------------------------


def test_a_click_takes(pen: Pen, model: Model) -> None:
    model.answers = [THREE]
    pen.write(START)
    pen.ask()
    pen.options.nth(1).click()
    assert pen.text == f"{START} lord?"
    expect(pen.area).to_be_focused()


@pytest.mark.parametrize("key", ["Escape", "x", "ArrowLeft", "Backspace"])
def test_other_keys_drop(pen: Pen, model: Model, key: str) -> None:
    model.answers = [THREE]
    pen.write(START)
    pen.ask()
    pen.press(key)
    pen.dropped()
    assert pen.text == {"x": f"{START}x", "Backspace": START[:-1]}.get(key, START)


@pytest.mark.parametrize("key", ["Escape", "x"])
def test_a_question_is_called_off(pen: Pen, key: str) -> None:
    pen.page.route("**/v1/completions", lambda route: None)  # which is never answered
    pen.write(START)
    pen.press("Tab")
    expect(pen.page.locator("#waiting")).to_be_visible()
    with pen.page.expect_event("requestfailed") as failed:
        pen.press(key)
    assert "ABORTED" in str(failed.value.failure)
    pen.dropped()
    expect(pen.notice).not_to_have_class("error")


def test_the_same_suggestion_is_offered_once_and_an_empty_one_not(pen: Pen, model: Model) -> None:
    model.answers = [[[" a"], [" a"], []], [[], [], []]]
    pen.write(START)
    pen.ask()
    assert pen.options.all_text_contents() == ["a"]
    pen.press("Escape")
    pen.area.press("End")
    pen.press("Tab")
    pen.say("would end")


def test_a_suggestion_goes_between_what_is_there(pen: Pen, model: Model) -> None:
    model.answers = [[[" x"]]]
    pen.write("one two three")
    pen.select(3)
    pen.ask()
    assert model.asked[0]["prompt"] == "one"
    pen.press("Enter")
    assert pen.text == "one x two three"
    pen.select(5, 9)
    pen.ask()
    assert model.asked[1]["prompt"] == "one x"
    pen.press("Enter")
    assert pen.text == "one x x three"


def test_a_space_at_the_end_is_the_next_words(pen: Pen, model: Model) -> None:
    model.answers = [[[" x"]]]
    pen.write("one ")
    pen.ask()
    assert model.asked[0]["prompt"] == "one"
    pen.press("Enter")
    assert pen.text == "one x"
    pen.press("Control+z")
    assert pen.text == "one "


def test_a_pause_suggests_and_leaves_enter_alone(pen: Pen, model: Model) -> None:
    model.answers = [THREE]
    pen.page.get_by_label("Suggest in pauses").check()
    pen.write("one")
    pen.offered()
    assert pen.area.get_attribute("aria-activedescendant") is None
    pen.press("Enter")
    assert pen.text == "one\n"
    pen.offered()
    pen.press("ArrowDown", "ArrowDown", "Enter")
    assert pen.text == "one\n lord?"


def test_without_the_switch_a_pause_is_a_pause(pen: Pen, model: Model) -> None:
    pen.write("one")
    pen.page.wait_for_timeout(1500)
    assert not model.asked


# --- alternatives ----------------------------------------------------------------------------------------------------


def test_another_token_goes_on_from_there(written: Pen, model: Model) -> None:
    written.point(written.marks.nth(1))
    written.offered()
    assert written.options.all_text_contents() == [",60.7 %".replace("60.7", "61"), "·other22 %", "↵5.0 %"]
    with written.page.expect_response("**/v1/completions"):
        written.options.nth(1).click()
    assert written.text == f"{START} love other" and model.asked[-1]["prompt"] == written.text
    written.offered()
    assert written.marks.all_text_contents() == [" love", " other"]
    written.press("Escape", "Control+z")
    assert written.text == f"{START} love, and mine"
    assert written.marks.all_text_contents() == [" love", ",", " and", " mine"]


def test_alternatives_by_keys(written: Pen) -> None:
    written.select(len(START) + 3)
    written.press("Alt+ArrowDown")
    expect(written.page.get_by_role("listbox")).to_have_accessible_name("Alternatives to love")
    written.say("3 alternatives")
    written.press("ArrowDown", "Enter")
    assert written.text == f"{START} other"
    written.press("Escape")
    written.select(2)
    written.press("Alt+ArrowDown")
    written.say("did not write")


def test_the_text_can_end_where_the_model_might_have(pen: Pen) -> None:
    written = choice(0, [" x", " y"], 3)
    written["logprobs"]["top_logprobs"] = [{" x": -0.1}, {" y": -0.1, "<|endoftext|>": -2.0}]
    pen.page.route("**/v1/completions", lambda route: route.fulfill(body=stream([written])))
    pen.write("one")
    pen.ask()
    pen.press("Enter", "Alt+ArrowDown", "ArrowDown")
    assert pen.options.all_text_contents() == ["·y90 %", "(the text ends)14 %"]
    pen.press("Enter")
    pen.dropped()
    assert pen.text == "one x"


def test_the_pointer_takes_its_alternatives_with_it(written: Pen) -> None:
    written.point(written.marks.nth(2))
    written.offered()
    written.press("Enter")  # which is for the text, not for them
    assert written.text == f"{START} love, and mine\n"
    written.point(written.marks.nth(0))
    written.offered()
    written.page.mouse.move(5, 5)
    written.dropped()
    written.point(written.marks.nth(0))
    written.offered()
    written.press("Escape")
    written.dropped()


def test_what_is_changed_is_the_writers_own(written: Pen) -> None:
    written.select(len(START) + 2)
    written.press("x")
    assert written.marks.all_text_contents() == [",", " and", " mine"]
    written.select(0)
    written.press("y")
    assert written.marks.all_text_contents() == [",", " and", " mine"]
    written.point(written.marks.nth(1))
    written.offered()
    written.press("Control+z", "Control+z")
    assert written.marks.all_text_contents() == [" love", ",", " and", " mine"]


def test_offsets_count_characters(pen: Pen, model: Model) -> None:
    model.answers = [[[" 🎭", "!", " 👩‍👩‍👧", " é"]]]
    pen.put("🎭 is")
    pen.ask()
    pen.press("Enter")
    assert pen.text == "🎭 is 🎭! 👩‍👩‍👧 é"
    assert pen.marks.all_text_contents() == [" 🎭", "!", " 👩‍👩‍👧", " é"]


# --- undo, and what is kept ------------------------------------------------------------------------------------------


def test_undo_takes_back_step_by_step(written: Pen) -> None:
    written.write("!")
    for _ in range(2):
        written.press("Control+z")
    assert written.text == START
    written.press("Control+Shift+z")
    assert written.text == f"{START} love, and mine"
    assert written.marks.count() == 4
    written.page.get_by_role("button", name="Undo").click()
    assert written.text == START
    written.page.get_by_role("button", name="Redo").click()
    assert written.text == f"{START} love, and mine"
    written.page.get_by_role("button", name="Clear").click()
    assert written.text == "" and not written.marks.count()
    written.press("Control+z")
    assert written.text == f"{START} love, and mine" and written.marks.count() == 4


def test_a_reload_finds_all_and_forgetting_nothing(written: Pen) -> None:
    written.set("temperature", "1.5")
    written.set("seed", "3")
    text = written.text
    written.page.reload()
    assert written.text == text and written.marks.all_text_contents() == [" love", ",", " and", " mine"]
    assert written.page.locator("#temperature").input_value() == "1.5"
    assert written.page.locator("#seed").input_value() == "3"
    expect(written.page.locator("#temperature-shown")).to_have_text("1.50")
    with written.page.expect_navigation():
        written.page.get_by_role("button", name="Forget all").click()
    expect(written.area).to_have_value("")
    assert written.page.locator("#temperature").input_value() == "0.8"
    assert written.page.evaluate("localStorage.length + sessionStorage.length") <= 1  # whether settings are shown


def test_counts(written: Pen) -> None:
    expect(written.page.locator("#count")).to_have_text("8 words · about 5 tokens")


def test_the_text_can_be_taken_away(written: Pen, tmp_path: Path) -> None:
    with written.page.expect_download() as info:
        written.page.get_by_role("button", name="Export").click()
    assert info.value.suggested_filename.endswith(".txt")
    assert Path(info.value.path()).read_text("utf-8") == written.text


def test_a_second_tab_is_told_of(opened: Callable[..., Pen]) -> None:
    first = opened()
    first.write("one")
    second = Pen(first.page.context.new_page(), first.page.url)
    second.write("two")
    first.say("another tab")
