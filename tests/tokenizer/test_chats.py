"""Chats: what a template spells, what of it is asked for, and where the template is kept, as in transformers."""

import inspect
import json
import random
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from gpt2_multi.errors import TokenizerError
from gpt2_multi.tokenizer.tokenizer import GPT2Tokenizer
from tests.tokenizer.test_tokenizer import END, small

pytest.importorskip("jinja2")

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{%- for m in messages %}\n<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content | trim }}"
    "{% if m.name is defined %}:{{ m.name }}{% endif %}{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}\n<assistant>{% endif %}{{ closing | default('') }}"
)
TALK = [
    {"role": "user", "content": "hello é ", "name": None},
    {"role": "assistant", "content": " world 😀"},
    {"role": "user", "content": "12"},
    {"role": "assistant", "content": "the 中"},
]
SHORT = [{"role": "user", "content": "12 the"}]
CALLS = [
    {"add_generation_prompt": True},
    {"tokenize": False, "tools": [{"name": "é<"}], "documents": [{"text": "the"}], "closing": "!"},
    {"tokenize": False, "continue_final_message": True},
    {"tokenize": False, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "bos_token": "x"},
    {"padding": True, "truncation": True, "max_length": 40},
    {"return_dict": True, "return_assistant_tokens_mask": True},
    {"return_dict": True, "return_assistant_tokens_mask": True, "padding": True, "return_tensors": "np"},
    {"return_dict": True, "return_assistant_tokens_mask": True, "truncation": True, "max_length": 24},
    {"return_dict": True, "tokenizer_kwargs": {"return_offsets_mapping": True}},
    {"return_tensors": "np", "padding": "max_length", "max_length": 90},
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder, tokenizer = tmp_path_factory.mktemp("chats"), small(pad_token=END)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder)


def plain(found):
    if hasattr(found, "items"):
        return {name: plain(value) for name, value in found.items()}
    return found.tolist() if hasattr(found, "tolist") else found


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("chats", [TALK, [TALK, SHORT], [SHORT]], ids=["one", "two", "batch-of-one"])
def test_chats_are_what_transformers_makes_of_them(both, options, chats):
    ours, theirs = (tokenizer.apply_chat_template(chats, **{"return_dict": False, **options}) for tokenizer in both)
    assert plain(ours) == plain(theirs)


@dataclass
class Message:
    role: str
    content: str


def test_chats_come_in_other_shapes(both):
    tokenizer, _ = both
    text = tokenizer.apply_chat_template(SHORT, tokenize=False)
    for chat in ([Message("user", "12 the")], SimpleNamespace(messages=SHORT), tuple(SHORT)):
        assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    blocks = [{"role": "assistant", "content": [{"type": "text", "text": "the w"}]}]
    spelled = "{% for m in messages %}{{ m.content[0].text }}</s>{% endfor %}"
    found = tokenizer.apply_chat_template(blocks, None, None, spelled, tokenize=False, continue_final_message=True)
    assert found == "the w" and blocks[0]["content"][0]["text"] == "the w"


def test_only_the_end_of_a_message_is_where_it_goes_on(both):
    """A message that the template's own ending begins with; its text alone would be found there."""
    tokenizer, _ = both
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    options = {"chat_template": template, "tokenize": False, "continue_final_message": True}
    assert tokenizer.apply_chat_template([{"role": "assistant", "content": "s"}], **options) == "s"


@pytest.mark.parametrize(
    ("chat", "options", "sentence"),
    [
        ([], {}, "conversation: expected at least one message, found none; give one"),
        (["a"], {}, "conversation: expected messages as dicts, found a str in a chat"),
        (SHORT, {"add_generation_prompt": True, "continue_final_message": True}, "cannot be used with add_generation"),
        (SHORT, {"return_assistant_tokens_mask": True}, "is an entry of what return_dict=True gives; set it too"),
        (SHORT, {"continue_final_message": True, "chat_template": "a"}, "has not its last message; leave it out"),
        (SHORT, {"continue_final_message": "thinking"}, "expected a text in 'thinking' of the last message"),
        (SHORT, {"tools": [small]}, "tools: expected JSON schemas as dicts, found a function; give its schema"),
        (SHORT, {"chat_template": "{{ messages.append(1) }}"}, "chat_template: cannot spell these messages"),
        (SHORT, {"chat_template": "{{ messages.__class__.mro() }}"}, "chat_template: cannot spell these messages"),
        (SHORT, {"chat_template": "{{ raise_exception('no') }}"}, r"cannot spell these messages \(no\); check both"),
        (SHORT, {"chat_template": "{% generation %}"}, "chat_template: cannot spell these messages"),
        (
            SHORT,
            {"sanitize_control_tokens": True, "tokenize": False},
            "a text does not show its tokens",
        ),
        (
            SHORT,
            {"sanitize_control_tokens": True, "return_assistant_tokens_mask": True},
            "sanitize_control_tokens: cannot",
        ),
    ],
)
def test_what_cannot_be_spelled(both, chat, options, sentence):
    with pytest.raises(TokenizerError, match=sentence):
        both[0].apply_chat_template(chat, **options)


def test_a_template_sees_no_objects(both, tmp_path):
    """Which have methods, of which the sandbox knows nothing: NumPy's arrays write files."""
    numpy = pytest.importorskip("numpy")
    chat = [{"role": "user", "content": numpy.zeros(3)}]
    template = f"{{{{ messages[0].content.tofile('{tmp_path / 'written'}') }}}}"
    with pytest.raises(TokenizerError, match="cannot spell"):
        both[0].apply_chat_template(chat, chat_template=template)
    assert not (tmp_path / "written").exists()
    assert both[0].apply_chat_template(chat, chat_template="{{ messages[0].content }}", tokenize=False) == "<ndarray>"


@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefixed"])
def test_messages_of_strangers_hold_no_control_token(tmp_path, prefix):
    """As transformers 5 reads them: also where a mark of its own or of ours is forged."""
    transformers = pytest.importorskip("transformers")
    tokenizer = small(pad_token="<pad>", add_prefix_space=prefix, chat_template=TEMPLATE)
    tokenizer.add_tokens(["<user>", "<word>"])
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = [
        END,
        "<pad>",
        "<user>",
        "<word>",
        "hello",
        " ",
        "\n",
        "é",
        "😀",
        END[:5],
        END[5:],
        "\ue002",
        "\ue003",
        "the",
    ]
    rng = random.Random(3)
    text = lambda: "".join(rng.choices(words, k=rng.randint(0, 7)))  # noqa: E731
    for _ in range(60):
        chat = [{"role": role, "content": text()} for role in ("user", "assistant", END, "user")]
        options = {"closing": text(), "documents": [{"text": text()}], "add_generation_prompt": rng.random() < 0.5}
        ours = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, **options)
        chat = [{name: value.translate({0xE002: None, 0xE003: None}) for name, value in part.items()} for part in chat]
        options["closing"] = options["closing"].translate({0xE002: None, 0xE003: None})
        options["documents"] = [{"text": options["documents"][0]["text"].translate({0xE002: None, 0xE003: None})}]
        if "sanitize_control_tokens" in inspect.signature(theirs.apply_chat_template).parameters:
            expected = theirs.apply_chat_template(chat, sanitize_control_tokens=True, return_dict=False, **options)
            assert ours == expected
        split = {"tokenizer_kwargs": {"split_special_tokens": True}}
        assert tokenizer.eos_token_id not in tokenizer.apply_chat_template(chat, **split, **options)
        tokenizer.split_special_tokens = True  # of texts, not of the template that is told apart from them
        assert tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, **options) == ours
        tokenizer.split_special_tokens = False
        assert ours.count(tokenizer.eos_token_id) == 2 and tokenizer.pad_token_id not in ours  # the template's
        spelled = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        assert prefix or tokenizer.decode(ours) == spelled
    tokenizer.add_special_tokens({"cls_token": "hello"})  # which the merges make, too
    with pytest.raises(TokenizerError, match="sanitize_control_tokens: 'hello' is what ordinary text becomes; take it"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], sanitize_control_tokens=True)


NAMED = {"default": "{{ messages[0].content }}", "rag": "{{ documents[0].text }}", "tool_use": "{{ tools[0].name }}"}


@pytest.mark.parametrize("template", [TEMPLATE, NAMED], ids=["one", "named"])
def test_templates_are_kept_in_files(tmp_path, template):
    """Ours and those that transformers writes, which are files of their own, are read by both."""
    transformers = pytest.importorskip("transformers")
    tokenizer = small(chat_template=template)
    tokenizer.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs.chat_template == template
    theirs.save_pretrained(tmp_path / "theirs")
    assert "chat_template" not in json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text("utf-8"))
    again = GPT2Tokenizer.from_pretrained(tmp_path / "theirs")
    assert again.chat_template == template
    again.save_pretrained(tmp_path / "theirs")  # over theirs
    again.chat_template = "other"
    again.save_pretrained(tmp_path / "theirs")
    assert GPT2Tokenizer.from_pretrained(tmp_path / "theirs").chat_template == "other"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs").chat_template == "other"
    assert GPT2Tokenizer.from_pretrained(tmp_path / "ours", chat_template="given").chat_template == "given"


def test_templates_have_names():
    tokenizer = small(chat_template=NAMED)
    given = {"tokenize": False, "documents": [{"text": "the"}]}
    assert tokenizer.apply_chat_template(SHORT, **given) == "12 the"
    assert tokenizer.apply_chat_template(SHORT, chat_template="rag", **given) == "the"
    assert tokenizer.apply_chat_template(SHORT, tools=[{"name": "look"}], **given) == "look"
    assert tokenizer.get_chat_template("{{ 1 }}") == "{{ 1 }}"
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(TokenizerError, match=r"expected the name of one of \['rag'\], found None"):
        tokenizer.get_chat_template()
