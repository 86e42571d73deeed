"""The SavedModel: loaded in a process that has neither this library nor Keras, it computes and generates the same."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_multi import GPT2Config, GPT2Tokenizer, pipeline
from gpt2_multi import tf as tfm
from gpt2_multi.errors import CheckpointError, InputError
from gpt2_multi.tf import TFGPT2LMHeadModel, TFGPT2Tokenizer
from gpt2_multi.tf.serve import export
from tests.support import fixtures

LOADER = """
import json, sys
sys.modules["gpt2_multi"] = sys.modules["keras"] = None  # importing them fails from here on
import tensorflow as tf

def plain(value):
    value = value.numpy().tolist()
    return [text.decode() for text in value] if value and isinstance(value[0], bytes) else value

def answer(loaded, name, inputs):
    if "text" in inputs:
        inputs["text"] = [text.encode("latin-1") for text in inputs["text"]]
    function = getattr(loaded, name)
    try:
        if name == "serve":  # of Keras' export, which takes one mapping of tensors
            function = lambda **given: loaded.serve({key: tf.constant(value) for key, value in given.items()})
        return {key: plain(value) for key, value in function(**inputs).items()}
    except tf.errors.InvalidArgumentError as error:
        return " ".join(str(error).split())

for line in sys.stdin:
    folder, calls = json.loads(line)
    loaded = tf.saved_model.load(folder)
    print(json.dumps([answer(loaded, *call) for call in calls]), flush=True)
"""
TEXTS = ["ROMEO:\n", "", "To be, or not to be", "caf\u00e9 \U0001f600 <|endoftext|> x", "\ufffe"]
CALLS = [
    {"do_sample": True, "seed": 7},
    {"do_sample": True, "seed": 2**40, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "max_new_tokens": 5},
    {"do_sample": True, "top_k": 7, "repetition_penalty": 1.3},
    {"max_new_tokens": 0},
]


@pytest.fixture(scope="module")
def model():
    return TFGPT2LMHeadModel.from_pretrained(fixtures.folder("lm"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's tokenizer as servers set it, and a small model of random weights for it."""
    tokenizer = GPT2Tokenizer.from_pretrained("demo", split_special_tokens=True)
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=16, n_layer=2, n_head=2)
    config = config.replace(eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id)
    fixtures.write_model(folder, config, "lm", dtype=np.float32)
    return TFGPT2LMHeadModel.from_pretrained(folder), tokenizer


@pytest.fixture(scope="module")
def ask():
    """What a fresh process gets from the functions of a folder, a call after the other; texts may be bytes."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command, environment = [sys.executable, "-c", LOADER], {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}

    def answers(folder, *calls):
        coded = [
            (name, {k: [raw(t).decode("latin-1") for t in v] if k == "text" else v for k, v in given.items()})
            for name, given in calls
        ]
        print(json.dumps([str(folder), coded]), file=process.stdin, flush=True)
        line = process.stdout.readline()
        assert line, "the process has ended; its error is above"
        return json.loads(line)

    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield answers
        process.stdin.close()


def raw(text):
    return text if isinstance(text, bytes) else text.encode()


def expected(model, tokenizer, texts, options):
    """What a pipeline gives: texts, ids filled up, and whether each came to an end token."""
    make = pipeline(model=model, tokenizer=tokenizer)
    made = [one["generated_text"] for each in make(texts, **options) for one in each]
    rows = [one["generated_token_ids"] for each in make(texts, return_tensors=True, **options) for one in each]
    config = model.generation_config.with_options(options)
    starts = [max(len(tokenizer(text).input_ids), 1) for text in texts for _ in range(config.num_return_sequences)]
    ended = [row[-1] in config.eos_token_ids and len(row) > start for row, start in zip(rows, starts, strict=True)]
    return made, filled(rows, config.fill_token_id), ended


def filled(rows, fill):
    return [row + [fill] * (max(map(len, rows)) - len(row)) for row in rows]


def test_a_fresh_process_writes_what_a_pipeline_writes(demo, tmp_path, ask):
    model, tokenizer = demo
    fixed = {"max_new_tokens": 12, "stop_strings": ["th", "e"]}
    model.export_saved_model(tmp_path / "saved", tokenizer=tokenizer, **fixed)
    bad = {"temperature": 0.0, "top_p": 1.5, "top_k": -1, "repetition_penalty": -1.0, "seed": -1, "max_new_tokens": -1}
    broken = b"a\xff\xf0\x9f\x98 b\xed\xa0\x80"
    answers = ask(
        tmp_path / "saved",
        *[("generate", {"text": TEXTS, **options}) for options in CALLS],
        ("tokenize", {"text": [*TEXTS, broken]}),
        ("generate", {"text": [broken]}),
        ("generate", {"text": []}),
        *[("generate", {"text": TEXTS, name: value}) for name, value in bad.items()],
        ("generate", {"text": TEXTS, "max_new_tokens": 2**31 - 1}),
        ("generate", {"text": ["so " * 400]}),
    )
    for options in CALLS:
        found, (texts, ids, ended) = answers.pop(0), expected(model, tokenizer, TEXTS, fixed | options)
        assert (found["text"], found["ids"]) == (texts, ids), options
        new = [text.removeprefix(prompt) for text, prompt in zip(texts, TEXTS, strict=True)]
        stopped = [any(stop in text for stop in fixed["stop_strings"]) for text in new]
        assert found["finished"] == [end or stop for end, stop in zip(ended, stopped, strict=True)]
    batch, found = tokenizer([*TEXTS, broken.decode(errors="replace")]), answers.pop(0)
    assert found["input_ids"] == filled(batch.input_ids, tokenizer.eos_token_id)
    assert found["attention_mask"] == filled(batch.attention_mask, 0)
    made, ids, _ = expected(model, tokenizer, [broken.decode(errors="replace")], fixed)
    found = answers.pop(0)
    assert (found["text"], found["ids"]) == (made, ids)
    assert answers.pop(0) == {"text": [], "ids": [], "finished": []}
    for name in bad:
        assert f"{name}: expected a" in answers.pop(0)
    assert all("are more than n_positions 256" in answer for answer in answers) and len(answers) == 2


def test_beams_are_the_same(demo, tmp_path, ask):
    model, tokenizer = demo
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "eos_token_id": [11, 1023]}
    model.export_saved_model(tmp_path / "saved", tokenizer=tokenizer, **options)
    calls = ({}, {"do_sample": True, "seed": 3, "max_new_tokens": 4}, {"repetition_penalty": 0.0})
    *answers, wrong = ask(tmp_path / "saved", *[("generate", {"text": TEXTS[:2], **given}) for given in calls])
    for answer, given in zip(answers, calls, strict=False):
        found = answer["text"], answer["ids"], answer["finished"]
        assert found == expected(model, tokenizer, TEXTS[:2], options | given)
    assert "repetition_penalty: expected a number above 0" in wrong


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
def test_ids_are_continued_without_a_tokenizer(jit, model, tmp_path, ask):
    options = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": jit, "num_return_sequences": 1 + jit}
    model.export_saved_model(tmp_path / "saved", jit_compile=jit, **options)
    recorded = fixtures.reference("lm")
    ids, mask = (recorded[name].astype(np.int32) for name in ("gen.input_ids", "in.mask_left"))
    inputs = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    short = {name: [row[-5:] for row in value[:1]] for name, value in inputs.items()}
    wrong = [{"input_ids": row, "attention_mask": np.ones_like(row).tolist()} for row in ([[503]], [[-1]], [[1] * 60])]
    whole, part, logits, outside, negative, long = ask(
        tmp_path / "saved",
        ("generate", inputs),
        ("generate", short),
        ("logits", inputs),
        *[("generate", given) for given in wrong],
    )
    for given, found in ((inputs, whole), (short, part)):
        assert found["ids"] == model.generate(**given, **options, jit_compile=False).numpy().tolist()
        assert found["finished"] == [False] * len(found["ids"])
    same = model(**inputs).logits.numpy()
    np.testing.assert_allclose(logits["logits"], same, rtol=0, atol=1e-5 * np.abs(same).max())
    assert "outside the vocabulary of 503" in outside and "an id is negative" in negative
    assert "a prompt and max_new_tokens are more than n_positions 64" in long


def test_a_servers_defaults_are_in_the_signatures(demo, tmp_path):
    from tensorflow.python.saved_model import loader_impl

    model, tokenizer = demo
    model.export_saved_model(tmp_path / "saved", tokenizer=tokenizer, max_new_tokens=9, do_sample=True, top_p=0.5)
    graph = loader_impl.parse_saved_model(str(tmp_path / "saved")).meta_graphs[0]
    signatures = {name: entry for name, entry in graph.signature_def.items() if not name.startswith("__")}
    assert set(signatures) == {"tokenize", "logits", "generate", "serving_default"}
    assert set(signatures["serving_default"].inputs) == {"text"}
    defaults = {name: tf.make_ndarray(value).item() for name, value in signatures["generate"].defaults.items()}
    assert defaults == {
        "max_new_tokens": 9, "do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.5,
        "repetition_penalty": 1.0, "seed": 0,
    }  # fmt: skip
    assert set(signatures["generate"].inputs) == {"text", *defaults}
    assert set(signatures["generate"].outputs) == {"text", "ids", "finished"}


def test_a_layer_tokenizes_in_the_file_as_it_is_set(demo, tmp_path):
    model, tokenizer = demo
    layer = TFGPT2Tokenizer.from_tokenizer(tokenizer, max_length=3, truncation_side="left", add_bos_token=True)
    model.export_saved_model(tmp_path / "saved", tokenizer=layer, max_new_tokens=2)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    ids = layer(["To be, or not to be"])["input_ids"]
    assert loaded.tokenize(["To be, or not to be"])["input_ids"].numpy().tolist() == ids.numpy().tolist()
    found = loaded.generate(["To be, or not to be"])
    assert found["ids"].numpy().tolist() == model.generate(ids, max_new_tokens=2).numpy().tolist()
    assert found["text"].numpy()[0].decode().startswith("To be, or not to be")


def test_strangers_write_no_control_tokens():
    tokenizer = GPT2Tokenizer.from_pretrained("demo")
    assert export.layer_of(tokenizer).settings["split_special_tokens"]
    layer = TFGPT2Tokenizer.from_tokenizer(tokenizer)
    assert export.layer_of(layer) is layer and not layer.settings["split_special_tokens"]


def test_a_text_without_a_token_needs_a_start(demo, tmp_path):
    model, tokenizer = demo
    model = TFGPT2LMHeadModel(model.config.replace(bos_token_id=None))
    model.export_saved_model(tmp_path / "saved", tokenizer=tokenizer, max_new_tokens=1)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    with pytest.raises(tf.errors.InvalidArgumentError, match="a text is empty, and bos_token_id None of the model"):
        loaded.generate(["a", ""])
    assert loaded.generate(["a"])["ids"].shape == (1, 2)


def test_a_saved_model_is_replaced_whole_and_nothing_else_is(model, tmp_path):
    where = tmp_path / "saved"
    model.export_saved_model(where, max_new_tokens=2)
    before = (where / "saved_model.pb").read_bytes()
    with pytest.raises(TypeError, match="no option 'max_new_token'; did you mean 'max_new_tokens'"):
        model.export_saved_model(where, max_new_token=3)
    with pytest.raises(InputError, match="sliding_window: cannot be traced"):
        model.export_saved_model(where, sliding_window=True)
    assert (where / "saved_model.pb").read_bytes() == before
    model.export_saved_model(where, max_new_tokens=3)
    assert (where / "saved_model.pb").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected a new folder or a SavedModel to replace"):
        model.export_saved_model(tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


def test_settings_of_the_model_are_a_pipelines_or_left_out(demo, tmp_path):
    model, tokenizer = demo
    task = {"text-generation": {"do_sample": True, "max_length": 50, "top_p": 0.9}}
    model = TFGPT2LMHeadModel(model.config.replace(extra={"task_specific_params": task}))
    with pytest.warns(UserWarning, match="max_length of the model's settings cannot be in a SavedModel"):
        model.export_saved_model(tmp_path / "saved", tokenizer=tokenizer)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    made = pipeline(model=model, tokenizer=tokenizer)(TEXTS[:2], max_new_tokens=20)
    assert [text.decode() for text in loaded.generate(TEXTS[:2])["text"].numpy()] == [
        t["generated_text"] for (t,) in made
    ]


def test_checks_come_before_what_they_are_for(model, tmp_path):
    model.export_saved_model(tmp_path / "saved", max_new_tokens=2, do_sample=True, num_return_sequences=2)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    for name, given, options, sentence in [
        ("generate", ([[1, 2]], [[0, 0]]), {}, "a prompt has no token"),
        ("generate", ([[1, 2]], [[1, 1]]), {"do_sample": False}, "num_return_sequences: greedy choice"),
        ("logits", ([[1] * 65], [[1] * 65]), {}, "are more than n_positions 64"),
    ]:
        with pytest.raises(tf.errors.InvalidArgumentError, match=sentence):
            getattr(loaded, name)(*given, **options)


@pytest.mark.parametrize("folder", ["", "gs://bucket/x", "a\0b", "x" * 300, "/dev/null", "mine"])
def test_a_place_that_cannot_be_is_one_sentence(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "saved_model.pb").write_text("")
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="expected"):
        model.export_saved_model(folder, max_new_tokens=2)
    assert {path.name for path in tmp_path.rglob("*")} == {"mine", "saved_model.pb", "thesis.txt"}


def test_a_disk_that_is_full_is_one_sentence(model, tmp_path, monkeypatch):
    def full(*_):
        raise tf.errors.ResourceExhaustedError(None, None, "no space left")

    monkeypatch.setattr(tf.saved_model, "save", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*no space left"):
        model.export_saved_model(tmp_path / "saved", max_new_tokens=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_length": 20}, "give max_new_tokens instead"),
        ({"max_new_tokens": 64}, "more than n_positions 64"),
        ({"do_sample": True, "seed": [1, 2]}, "seed: expected a whole number below"),
        ({"stop_strings": "a"}, "needs a tokenizer"),
        ({"tokenizer": "gpt2"}, "tokenizer: expected"),
        ({"jit_compile": "no"}, "jit_compile: expected True or False"),
    ],
)
def test_what_cannot_be_in_a_file_is_one_sentence(options, sentence, model, tmp_path):
    with pytest.raises(InputError, match=sentence):
        model.export_saved_model(tmp_path / "saved", **options)
    assert not list(tmp_path.iterdir())


# Keras' own export

SMALL = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, num_labels=3, pad_token_id=0)
IDS = np.random.default_rng(0).integers(1, 50, (3, 2, 6)).astype(np.int32)
MASK = np.ones_like(IDS)
MASK[0, :, 4:] = 0


def given_to(model):
    """What a new model is asked: rows, or choices in rows."""
    ids, mask = (IDS, MASK) if model.head == "double_heads" else (IDS[:, 0], MASK[:, 0])
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(found, model, given):
    """All that a file gives but for a cache, which no signature can hold."""
    expected = model(given)
    assert set(found) == set(expected) - {"past_key_values"}
    for name, value in found.items():
        np.testing.assert_allclose(value, np.array(expected[name]), rtol=0, atol=1e-5)


def test_a_model_is_exported_before_its_first_call_and_after_training(tmp_path, ask):
    model = TFGPT2LMHeadModel(SMALL)
    given = given_to(model)
    asked = {name: value.tolist() for name, value in given.items()}
    for epochs, place in enumerate(("new", "trained")):
        if epochs:
            model.compile("sgd", run_eagerly=True)
            model.fit({**given, "labels": given["input_ids"]}, verbose=0)
        model.export(tmp_path / place, verbose=False)
        (found,) = ask(tmp_path / place, ("serve", asked))
        assert_same(found, model, given)


@pytest.mark.parametrize("cls", [tfm.TFGPT2DoubleHeadsModel, tfm.TFGPT2ForQuestionAnswering])
def test_other_heads_are_exported(cls, tmp_path):
    model = cls(SMALL.replace(output_hidden_states=True, output_attentions=True))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    signature = loaded.signatures["serving_default"].structured_input_signature[1]
    assert set(signature) == {"input_ids", "attention_mask"}
    assert_same(loaded.serve(given_to(model)), model, given_to(model))


class Last(TFGPT2LMHeadModel):
    """A class of a caller's own, which gives a tensor."""

    def call(self, *args, **options):
        return super().call(*args, **options).logits[:, -1]


def test_a_class_of_a_caller_s_own_is_exported(tmp_path):
    model = Last(SMALL)
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(given_to(model)), model(given_to(model)), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.filterwarnings("ignore:.*PyUnicode_FromStringAndSize:DeprecationWarning")
def test_keras_exports_for_litert_with_free_sizes(tmp_path):
    model = TFGPT2LMHeadModel(SMALL)
    model.export(tmp_path / "m.tflite", format="litert", verbose=False)
    run = tf.lite.Interpreter(model_path=str(tmp_path / "m.tflite")).get_signature_runner()
    for length in (6, 3):
        given = {name: value[:, :length] for name, value in given_to(model).items()}
        assert_same(run(**given), model, given)


def test_an_archive_of_keras_holds_what_a_caller_puts_into_it(tmp_path):
    model = TFGPT2LMHeadModel(SMALL.replace(use_cache=False))
    ids = [keras.InputSpec(shape=(None, None), dtype="int32")]
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", model.call, ids)
    archive.add_endpoint("last", lambda ids: model(ids, use_cache=True).logits[:, -1], ids)
    archive.write_out(tmp_path / "archive", verbose=False)
    loaded, given = tf.saved_model.load(str(tmp_path / "archive")), IDS[:, 0]
    expected = model(given).logits
    np.testing.assert_allclose(loaded.serve(given)["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(loaded.last(given), expected[:, -1], atol=1e-5)
