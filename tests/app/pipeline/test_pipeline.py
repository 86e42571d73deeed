"""The pipeline as scripts for transformers call it: the same arguments, the same answers, whatever the backend."""

import itertools
import shutil

import pytest

from gpt2_multi import GPT2Config, GPT2Tokenizer, pipeline
from gpt2_multi.app import backends
from gpt2_multi.errors import InputError, TokenizerError
from gpt2_multi.files.hub import DEMO
from tests.support.effort import THOROUGH

TEXTS = ["ROMEO:", "What is the matter, my good lord and"]
CHAT = [{"role": "user", "content": "Who is there?"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "A friend of"}]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)
CALLS = {  # what is given, and the arguments
    "text": (TEXTS[0], {}),
    "list": (TEXTS, {"batch_size": 2}),
    "one-of-a-list": (TEXTS[:1], {}),
    "chat": (CHAT, {}),
    "chats": ([CHAT, PREFILLED], {"batch_size": 2}),
    "not-continued": (PREFILLED, {"continue_final_message": False}),
    "new-text": (TEXTS[1], {"return_full_text": False}),
    "new-text-of-a-chat": (CHAT, {"return_full_text": False}),
    "text-only": (TEXTS[0], {"return_text": True}),
    "ids": (TEXTS[1], {"return_tensors": True}),
    "prefix": (TEXTS[0], {"prefix": "First Citizen:\nSpeak.\n\n"}),
    "prefix-max-length": (TEXTS[0], {"prefix": "First Citizen:\n", "max_length": 12}),
    "stop": (TEXTS[1], {"stop_sequence": ["e", "!"]}),
    "truncation": (TEXTS[1], {"tokenizer_encode_kwargs": {"truncation": True, "max_length": 4}}),
    "hole": ("so it is " * 200, {"handle_long_generation": "hole"}),
    "several": (TEXTS[0], {"num_beams": 2, "num_return_sequences": 2}),
    "spaces": (TEXTS[0], {"clean_up_tokenization_spaces": False, "skip_special_tokens": True}),
    "add-special": ([TEXTS[0], ""], {"add_special_tokens": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shallow):
    """The demo model without the layers after its first, whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("chat")
    tokenizer = GPT2Tokenizer.from_pretrained(DEMO)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    tokenizer.save_pretrained(path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(shallow / name, path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' pipeline, of the same weights."""
    transformers = pytest.importorskip("transformers")
    return transformers.pipeline("text-generation", str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def ours():
    """A pipeline for each backend, made once."""
    return {}


@pytest.fixture
def generator(backend, ours, folder):
    """Ours, of the same weights."""
    name = backend.__name__
    if name not in ours:
        ours[name] = pipeline("text-generation", str(folder), framework=name, device=-1)
    return ours[name]


@pytest.mark.filterwarnings("ignore")  # theirs speaks of lengths
def test_answers_are_those_of_transformers(generator, theirs):
    """What becomes of a call before and after `generate` knows of no backend: all of it is tried on the first."""
    pytest.importorskip("jinja2")
    first = generator.framework == backends.installed()[0]
    for call in CALLS if THOROUGH or first else ("list", "stop", "several"):
        given, options = CALLS[call]
        options = {"do_sample": False, **({} if "max_length" in options else {"max_new_tokens": 8}), **options}
        assert generator(given, **options) == theirs(given, **options), call


@pytest.mark.filterwarnings("ignore")
def test_what_yields_prompts_is_read_as_it_comes(generator):
    options = {"do_sample": False, "max_new_tokens": 3}
    expected = generator(TEXTS, **options)
    endless = itertools.cycle(TEXTS)
    assert list(itertools.islice(generator(endless, batch_size=2, **options), 2)) == expected
    dataset = type("Dataset", (), {"__len__": lambda self: 2, "__getitem__": lambda self, i: TEXTS[i]})()
    assert list(generator(dataset, **options)) == expected
    assert list(generator(iter(()), **options)) == []
    assert generator([], **options) == []


def test_arguments_of_the_pipeline_hold_for_every_call(folder):
    pytest.importorskip("torch")
    import torch

    options = {"do_sample": False, "max_new_tokens": 4, "return_full_text": False, "batch_size": 1}
    more = {"use_fast": True, "trust_remote_code": False, "device_map": "auto", "torch_dtype": torch.bfloat16}
    made = pipeline(model=str(folder), tokenizer=str(folder), framework="pt", **options, **more)
    assert made.model.dtype == torch.bfloat16 and made.batch_size == 1 and made.framework == "pt"
    (answer,) = made("ROMEO:")
    assert not answer["generated_text"].startswith("ROMEO:")
    assert made("ROMEO:", return_full_text=True) == [{"generated_text": "ROMEO:" + answer["generated_text"]}]
    assert made("ROMEO:", generate_kwargs={"max_new_tokens": 1})[0]["generated_text"] < answer["generated_text"]
    kinder = made.model.config.to_dict() | {"eos_token_id": 7}
    told = pipeline(model=str(folder), framework="pt", config=GPT2Config(**kinder), model_kwargs={"subfolder": ""})
    assert told.model.config.eos_token_id == 7
    moved = pipeline("text-generation", model=made.model, tokenizer=made.tokenizer, device="cpu", framework="pt")
    assert moved("ROMEO:", **options) == [answer]


def test_functions_of_the_caller_reach_generate(folder):
    pytest.importorskip("torch")
    made = pipeline(model=str(folder), framework="pt")
    only = made.tokenizer.encode("e")
    answer = made("ROM", max_new_tokens=3, prefix_allowed_tokens_fn=lambda row, ids: only)
    assert answer == [{"generated_text": "ROMeee"}]


def test_what_cannot_be_answered_is_one_sentence(folder, tmp_path):
    pytest.importorskip("torch")
    made = pipeline(model=str(folder), framework="pt")
    plain, same = pipeline(framework="pt"), GPT2Tokenizer.from_pretrained(folder)
    small = GPT2Tokenizer({"a": 0}, [])
    assert made("A", stop_strings=["e"], tokenizer=same) == made("A", stop_sequence="e")
    for call, sentence in [
        (
            lambda: made("A", return_tensors=True, return_full_text=True),
            "return_tensors: cannot be used with return_full",
        ),
        (lambda: made("A", handle_long_generation="cut"), 'handle_long_generation: expected None or "hole", found'),
        (lambda: made("A", handle_long_generation="hole", max_new_tokens=256), "256 new tokens leave no room"),
        (lambda: made([*CHAT, {"role": "user"}]), "text_inputs: expected messages"),
        (
            lambda: made("A", tokenizer=small),
            "expected the pipeline's own, found a GPT2Tokenizer of .* vocabulary; make",
        ),
        (lambda: plain(CHAT), "chat_template: expected a template, found None; set tokenizer.chat_template"),
        (lambda: pipeline(framework="pt", backend="tf"), "framework: is 'pt', and backend is 'tf'; give one"),
        (lambda: pipeline(framework="pt", device_map="sequential:7"), "device: expected one of"),
    ]:
        with pytest.raises((InputError, TokenizerError), match=sentence):
            call()
    with pytest.raises(TypeError, match="did you mean 'return_full_text'"):
        made("A", return_fulltext=True)


def test_templates_run_in_a_sandbox(folder):
    pytest.importorskip("jinja2")
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "USER:\nWho is there?\n\nASSISTANT:\n"
    assert tokenizer.apply_chat_template([CHAT, CHAT], add_generation_prompt=True) == [tokenizer.encode(text)] * 2
    assert tokenizer.apply_chat_template(PREFILLED, tokenize=False, continue_final_message=True).endswith("friend of")
    for attack in ("{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}"):
        with pytest.raises(TokenizerError, match="chat_template: cannot spell these messages"):
            tokenizer.apply_chat_template(CHAT, chat_template=attack, tokenize=False)
    with pytest.raises(TokenizerError, match=r"cannot spell these messages \(only users speak\); check both"):
        tokenizer.apply_chat_template(CHAT, chat_template="{{ raise_exception('only users speak') }}")


def test_the_backend_of_a_model_is_known(generator):
    assert backends.BACKENDS[generator.framework].language_model == type(generator.model).__name__
