"""Templates that stand in files: the one that spells a chat as a text. What a file says is only ever rendered.

Jinja runs it in its sandbox, which cannot reach Python's objects, and it is imported when there is a chat to spell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from gpt2_multi.errors import TokenizerError

Messages = Sequence[Mapping[str, Any]]


def render_chat(template: str, messages: Messages, **names: Any) -> str:
    """The text of a chat; `names` are what the template may speak of, such as `add_generation_prompt`.

    Raises:
        TokenizerError: Jinja is not installed, or the template is damaged, or refuses these messages.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise TokenizerError('chat_template: needs Jinja; pip install "gpt2-multi[chat]"') from None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(template).render(messages=messages, **names)
    except (TemplateError, TypeError, ValueError) as error:
        raise TokenizerError(f"chat_template: cannot spell these messages ({error}); check both") from error


def _json(value: Any, **options: Any) -> str:
    """As it is, where Jinja's own filter would write it for HTML."""
    return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)


def up_to_message(text: str, message: Any) -> str:
    """A rendered chat without what follows its last message, which is to be continued.

    Raises:
        TokenizerError: the template alters the message.
    """
    content = message.strip() if isinstance(message, str) else ""
    at = text.rfind(content)
    if not content or at < 0:
        raise TokenizerError(
            "continue_final_message: the chat's text has not its last message; leave it out, or change chat_template"
        )
    return text[: at + len(content)]
