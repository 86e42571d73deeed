"""examples/serve_savedmodel.md: its export, loaded by plain TensorFlow, answers its requests as it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

tf = pytest.importorskip("tensorflow")

from gpt2_multi import pipeline
from gpt2_multi.app import cli

PAGE = (Path(__file__).resolve().parents[3] / "examples" / "serve_savedmodel.md").read_text("utf-8")
REQUESTS = re.findall(r"```sh\ncurl -d '(.+?)' -X POST http://localhost:8501/\S+\n```\n\n```json\n(.+?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder in which the page's export was run."""
    root = tmp_path_factory.mktemp("served")
    (command,) = re.findall(r"^gpt2-multi (.+)$", PAGE, re.MULTILINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = CliRunner().invoke(cli.main, shlex.split(command))
    assert (result.exit_code, result.stderr) == (0, "") and "tokenize, logits, generate" in result.stdout
    return root


@pytest.fixture(scope="module")
def loaded(served):
    """What plain TensorFlow makes of it."""
    return tf.saved_model.load(str(served / "served" / "demo" / "1"))


def plain(value):
    """A tensor as the server's JSON has it."""
    value = value.numpy().tolist()
    return [text.decode() for text in value] if value and isinstance(value[0], bytes) else value


def answer(loaded, request):
    """What the server makes of a request: every input has to be named; rows come back as rows, columns as columns."""
    signature = loaded.signatures[request.get("signature_name", "serving_default")]
    specs = signature.structured_input_signature[1]
    inputs = request.get("inputs") or dict.fromkeys(specs, request["instances"])
    assert set(inputs) == set(specs)
    given = {name: tf.constant(value, specs[name].dtype) for name, value in inputs.items()}
    outputs = {name: plain(value) for name, value in signature(**given).items()}
    if "inputs" in request:
        return {"outputs": outputs}
    rows = len(request["instances"])
    return {"predictions": [{name: value[row] for name, value in outputs.items()} for row in range(rows)]}


@pytest.mark.parametrize("number", range(3))
def test_the_page_says_what_a_server_answers(number, loaded):
    request, response = map(json.loads, REQUESTS[number])
    assert answer(loaded, request) == response


def test_the_texts_are_those_of_a_pipeline(served, monkeypatch, capsys):
    _, response = map(json.loads, REQUESTS[1])
    (call,) = re.findall(r"`(pipeline\(.+?\))`", PAGE)
    made = eval(call, {"pipeline": pipeline, "texts": ["ROMEO:", "What say you"]})
    assert [one["generated_text"] for (one,) in made] == response["outputs"]["text"]
    (code,) = re.findall(r"```python\n(.+?)```", PAGE, re.S)
    monkeypatch.chdir(served)
    exec(code, {})
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in response["outputs"]["text"])
