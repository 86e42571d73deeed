"""Measure a model with EleutherAI's lm_eval: the figures are those of transformers' class, and of `evaluate`."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

LINES = [
    "To be, or not to be, that is the question: whether tis nobler in the mind to suffer the slings of fortune",
    "What say you, my lord, shall we go in to dinner, or stay here and wait until your brother comes from court",
    "O Romeo, Romeo, wherefore art thou Romeo? Deny thy father and refuse thy name, or if thou wilt not be sworn",
    "Now is the winter of our discontent made glorious summer by this sun of York, and all the clouds are gone",
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def own(name: str, file: str, split: str) -> dict:
    """A task of lm_eval on a file of ours."""
    (path,) = (Path(lm_eval.__file__).parent / "tasks").glob(f"*/{name}.yaml")
    splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: file}}}
    return load_yaml(path, resolve_func=True) | splits | data | {f"{split}_split": split}


write("lambada_openai.jsonl", [{"text": line} for line in LINES])
write(
    "hellaswag.jsonl",
    [
        {
            "activity_label": "Going [step] on",
            "ctx_a": f"{line[:50]} [title] so",
            "ctx_b": "he  then",
            "endings": [line[50:], "the king [substeps] goes", "é日", "no"],
            "label": i,
        }
        for i, line in enumerate(LINES)
    ],
)
write(
    "arc_easy.jsonl",
    [
        {
            "question": line[:40],
            "choices": {"text": [line[40:], "a lord", "of much longer speech", "no"], "label": list("ABCD")},
            "answerKey": "ABCD"[i],
        }
        for i, line in enumerate(LINES)
    ],
)
write(
    "piqa.jsonl", [{"goal": x[:30], "sol1": x[30:60], "sol2": "the king", "label": i % 2} for i, x in enumerate(LINES)]
)
write("wikitext.jsonl", [{"page": line * 12} for line in LINES])
written = {
    "task": "written",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "lambada_openai.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": ".",
    "generation_kwargs": {"until": ["\n", ":"], "max_gen_toks": 16},
}
TASKS = [
    own("lambada_openai", "lambada_openai.jsonl", "test"),
    own("hellaswag", "hellaswag.jsonl", "validation"),
    own("arc_easy", "arc_easy.jsonl", "test"),
    own("piqa", "piqa.jsonl", "validation"),
    own("wikitext", "wikitext.jsonl", "test"),
    written,
]


def measured(lm, **options) -> tuple[dict, list]:
    found = lm_eval.simple_evaluate(model=lm, tasks=TASKS, log_samples=True, bootstrap_iters=100, **options)
    return found["results"], [sample["resps"] for task in found["samples"].values() for sample in task]


def check(found: tuple[dict, list], expected: tuple[dict, list]) -> None:
    for task, figures in expected[0].items():
        for name, figure in figures.items():
            if isinstance(figure, float):
                assert np.isclose(found[0][task][name], figure, rtol=1e-4), (task, name)
    for mine, other in zip(found[1], expected[1], strict=True):  # each answer: numbers, or texts
        assert mine == other or np.allclose(mine, other, atol=1e-3), (mine, other)


tokenizer = GPT2Tokenizer.from_pretrained("demo")
tokenizer.chat_template = TEMPLATE
GPT2LMHeadModel.from_pretrained("demo").save_pretrained("saved")
tokenizer.save_pretrained("saved")
theirs = HFLM(
    pretrained=AutoModelForCausalLM.from_pretrained("saved"), tokenizer=AutoTokenizer.from_pretrained("saved")
)
expected = measured(theirs)

# By an entry point, as lm_eval after 0.4.13 finds it; to load it is to register it.
(entry,) = entry_points(group="lm_eval.models", name="gpt2_multi")
model = entry.load()
for backend in ("pt", "tf", "flax"):
    check(measured("gpt2_multi", model_args=f"pretrained=saved,backend={backend}", batch_size="auto"), expected)
print(expected[0])

# In chats, with examples before the question.
chat = {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True}
check(measured(model("saved", backend="pt", batch_size=2), **chat), measured(theirs, **chat))

# By the command line of lm_eval, whatever its version.
Path("lines.yaml").write_text(json.dumps(written))  # which is YAML too
command = ["--model", "gpt2_multi", "--model_args", "pretrained=saved,backend=pt", "--tasks", "lines.yaml"]
run = [sys.executable, "-m", "gpt2_multi", "lm-eval", *command, "--output_path", "results"]
print(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
(file,) = Path("results").rglob("results_*.json")
figures = json.loads(file.read_text())["results"]["written"]
assert figures["exact_match,none"] == expected[0]["written"]["exact_match,none"]

wrong = [each.replace("backend=pt", "backends=pt") for each in run]
said = subprocess.run(wrong, capture_output=True, text=True).stderr.splitlines()[-1]
assert said.endswith("none of the arguments of gpt2_multi; did you mean 'backend'?"), said

# The same by our own command.
for name in ("lambada_openai", "hellaswag", "arc_easy", "piqa"):
    task = {"lambada_openai": "lambada", "hellaswag": "hellaswag"}.get(name, "choices")
    run = [sys.executable, "-m", "gpt2_multi", "evaluate", "saved", f"{name}.jsonl", "--task", task, "--json"]
    found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    for figure in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "perplexity"):
        if f"{figure},none" in expected[0][name]:
            assert np.isclose(found[figure], expected[0][name][f"{figure},none"], rtol=1e-4), (name, figure)
