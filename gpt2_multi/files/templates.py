"""Templates that stand in files: the one that spells a chat as a text. What a file says is only ever rendered.

Jinja runs it in its sandbox, which cannot reach Python's objects, and it sees nothing but texts, numbers, lists and
dicts. It is imported when there is a chat to spell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from gpt2_multi.errors import TokenizerError, described

if TYPE_CHECKING:
    from jinja2 import Template

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
MARKS = ("\ue002", "\ue003")
TAG = "\ue000continued here\ue001 "  # what stands for the end of a message; of Unicode's private characters


class Rendering:
    """A text while it is rendered, and the spans of it that the template says an assistant generates."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.spans: list[Span] = []

    def generated(self, text: str) -> None:
        """Take down that this text follows what there is."""
        start = sum(map(len, self.parts))
        self.spans.append((start, start + len(text)))


_current: ContextVar[Rendering] = ContextVar("rendering")


def pick(own: Any, name: str | None, tools: Any = None) -> str:
    """The template of a name among those of a tokenizer, or the text that is given as one; else the tokenizer's own.

    Raises:
        TokenizerError: there is none.
    """
    if isinstance(own, Mapping):
        usual = "tool_use" if tools is not None and "tool_use" in own else "default"
        found = own.get(usual if name is None else name, name)
    else:
        found = own if name is None else name
    if isinstance(found, str):
        return found
    if isinstance(own, Mapping):
        raise TokenizerError(f"chat_template: expected the name of one of {sorted(own)}, found {name!r}; give one")
    raise TokenizerError(f"chat_template: expected a template, found {found!r}; set tokenizer.chat_template")


def from_json(found: Any) -> Any:
    """A template, or a template for each name, from how a file has them: a text, or a list."""
    return {row["name"]: row["template"] for row in found} if isinstance(found, list) else found


def to_json(own: Any) -> Any:
    """The same as a file has them."""
    if isinstance(own, Mapping):
        return [{"name": name, "template": text} for name, text in own.items()]
    return own


def render_chat(template: str, messages: Any, **names: Any) -> tuple[str, list[Span]]:
    """The text of a chat, and its spans within `{% generation %}`.

    messages: dicts, or what holds some as `messages`; a value None is as if it were not there. `names` are what the
    template may speak of besides, such as `add_generation_prompt`.

    Raises:
        TokenizerError: Jinja is not installed, or the template is damaged, or refuses these messages.
    """
    try:
        from jinja2 import TemplateError
    except ImportError:
        raise TokenizerError('chat_template: needs Jinja; pip install "gpt2-multi[chat]"') from None
    made, names = Rendering(), {name: _plain(value) for name, value in names.items()}
    token = _current.set(made)
    try:
        for part in _compiled(template).generate(messages=_messages(messages), **names):
            made.parts.append(part)
    except (TemplateError, TypeError, ValueError) as error:
        raise TokenizerError(f"chat_template: cannot spell these messages ({error}); check both") from error
    finally:
        _current.reset(token)
    return "".join(made.parts), made.spans


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what an assistant generates."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_spelled"), [], [], body).set_lineno(line)

        def _spelled(self, caller: Any) -> str:
            text: str = caller()
            _current.get().generated(text)
            return text

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


class Guard:
    """What keeps tokens that stand in the messages of a chat apart from those that its template writes.

    They are marked before the template spells them. Marks that are in a message already, which could forge one, go.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        found = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        self._tokens, self._marks = re.compile(found), re.compile(f"{MARKS[0]}({found}){MARKS[1]}|[{''.join(MARKS)}]")

    def marked(self, value: Any) -> Any:
        """Plain data in which the tokens in texts are marked."""
        value = _plain(value)
        if isinstance(value, str):
            return self._tokens.sub(rf"{MARKS[0]}\g<0>{MARKS[1]}", value.translate(dict.fromkeys(map(ord, MARKS))))
        if isinstance(value, dict):
            return {name: self.marked(item) for name, item in value.items()}
        return [self.marked(item) for item in value] if isinstance(value, list) else value

    def spans(self, text: str) -> tuple[str, list[Span]]:
        """A text without its marks, and the spans that were marked; where a mark stood alone, an empty one."""
        parts, spans, size, done = [], [], 0, 0
        for match in self._marks.finditer(text):
            parts += [text[done : match.start()], match[1] or ""]
            size += len(parts[-2]) + len(parts[-1])
            spans.append((size - len(parts[-1]), size))
            done = match.end()
        return "".join([*parts, text[done:]]), spans


def _messages(chat: Any) -> list[dict[str, Any]]:
    found = [_plain(message) for message in getattr(chat, "messages", chat)]
    for message in found:
        if not isinstance(message, dict):
            raise TokenizerError(f"conversation: expected messages as dicts, found {described(message)} in a chat")
    return [{name: value for name, value in message.items() if value is not None} for message in found]


def _plain(value: Any) -> Any:
    """What the template sees: texts, numbers, lists and dicts; of anything else, which may have methods, its name."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return _plain(value.model_dump()) if hasattr(value, "model_dump") else f"<{type(value).__name__}>"


def schemas(tools: Any) -> Any:
    """Tools as a template sees them: JSON schemas.

    Raises:
        TokenizerError: one is something else.
    """
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise TokenizerError(
                f"tools: expected JSON schemas as dicts, found {described(tool)}; give its schema, which "
                "transformers.utils.get_json_schema makes of a function"
            )
    return tools


def _json(value: Any, **options: Any) -> str:
    """As it is, where Jinja's own filter would write it for HTML."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def check_request(prompted: Any, going_on: Any, masked: Any, guarded: Any, gives_mask: Any, gives_ids: Any) -> None:
    """Refuse what cannot be asked of a chat together.

    gives_mask, gives_ids: whether what is returned has room for a mask, and whether it is ids.
    """
    if going_on and prompted:
        raise TokenizerError("continue_final_message: cannot be used with add_generation_prompt; leave one out")
    if going_on and masked:
        raise TokenizerError("continue_final_message: cannot be used with return_assistant_tokens_mask; leave one out")
    if guarded and masked:
        raise TokenizerError("sanitize_control_tokens: cannot be used with return_assistant_tokens_mask; leave one out")
    if masked and not gives_mask:
        raise TokenizerError("return_assistant_tokens_mask: is an entry of what return_dict=True gives; set it too")
    if guarded and not gives_ids:
        raise TokenizerError("sanitize_control_tokens: a text does not show its tokens; leave out tokenize=False")


def as_chats(conversation: Any) -> tuple[list[Any], bool]:
    """A conversation, or several, as a list of them, and whether it was one."""
    if hasattr(conversation, "messages"):
        return [conversation], True
    found = list(conversation)
    if not found:
        raise TokenizerError("conversation: expected at least one message, found none; give one")
    several = isinstance(found[0], list | tuple) or hasattr(found[0], "messages")
    return (found, False) if several else ([found], True)


def spell(template: str, chat: Any, going_on: bool | str, names: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """What `render_chat` gives; with `going_on` up to the end of the last message's "content", or of that field.

    Raises:
        TokenizerError: as `render_chat`, or there is no such end.
    """
    if not going_on:
        return render_chat(template, chat, **names)
    text, spans = render_chat(template, _tagged(chat, going_on if isinstance(going_on, str) else "content"), **names)
    at = text.rfind(TAG.strip())
    if at < 0:
        raise TokenizerError(
            "continue_final_message: the chat's text has not its last message; leave it out, or change chat_template"
        )
    return (text[:at] if text.startswith(TAG, at) else text[:at].rstrip()), spans  # a template may trim messages


def _tagged(chat: Any, field: str) -> list[Any]:
    """A chat with a tag at the end of a field of its last message."""
    *before, last = getattr(chat, "messages", chat)
    last = _plain(last)
    content = last.get(field) if isinstance(last, dict) else None
    if isinstance(content, str):
        return [*before, {**last, field: content + TAG}]
    texts = [block for block in content or () if isinstance(block, dict) and isinstance(block.get("text"), str)]
    if not texts:
        raise TokenizerError(
            f"continue_final_message: expected a text in {field!r} of the last message, found {content!r}; leave it out"
        )
    texts[-1]["text"] += TAG  # in what _plain has copied
    return [*before, last]
