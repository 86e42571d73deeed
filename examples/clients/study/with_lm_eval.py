"""Measure a model with EleutherAI's lm_eval, through an adapter: the figures are those of transformers' class."""

import json
from pathlib import Path

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval_adapter import GPT2MultiLM  # beside this script
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

LINES = ["To be, or not to be, that is the question", "What say you, my lord?", "My lord, I will", "O Romeo, Romeo!"]
rows = [{"text": line, "choices": [" the king", " my lord", line[-5:]], "gold": 2} for line in LINES]
Path("lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "lines.jsonl"}}, "test_split": "test"}
choice = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}" * 40}
written = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "."}
TASKS = [
    {"task": "choice", **data, **choice},
    {"task": "rolling", **data, **rolling, "metric_list": [{"metric": "bits_per_byte"}]},
    {"task": "written", **data, **written, "generation_kwargs": {"until": ["\n", ":"], "max_gen_toks": 16}},
]


def measured(lm) -> tuple[dict, list]:
    found = lm_eval.simple_evaluate(model=lm, tasks=TASKS, log_samples=True, bootstrap_iters=0)
    return found["results"], [sample["resps"] for task in found["samples"].values() for sample in task]


GPT2LMHeadModel.from_pretrained("demo").save_pretrained("saved")
GPT2Tokenizer.from_pretrained("demo").save_pretrained("saved")
theirs = HFLM(
    pretrained=AutoModelForCausalLM.from_pretrained("saved"), tokenizer=AutoTokenizer.from_pretrained("saved")
)
(found, ours), (expected, others) = measured(GPT2MultiLM("saved")), measured(theirs)
print(found)
for task, metric in (("choice", "acc"), ("rolling", "bits_per_byte"), ("written", "exact_match")):
    assert np.isclose(found[task][f"{metric},none"], expected[task][f"{metric},none"])
for mine, other in zip(ours, others, strict=True):  # each answer: numbers, or texts
    assert mine == other or np.allclose(mine, other, atol=1e-3), (mine, other)
