"""Let xgrammar keep a text to a JSON schema: its own processor in PyTorch."""

import json

import xgrammar as xgr
from xgrammar.contrib.hf import LogitsProcessor

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

SCHEMA = {
    "type": "object",
    "properties": {"king": {"enum": ["Richard", "Henry", "Edward"]}, "year": {"enum": [1399, 1413, 1483]}},
    "required": ["king", "year"],
    "additionalProperties": False,
}
tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo")
size = model.config.vocab_size

info = xgr.TokenizerInfo(
    tokenizer.convert_ids_to_tokens(range(size)),
    xgr.VocabType.BYTE_LEVEL,
    vocab_size=size,
    stop_token_ids=[tokenizer.eos_token_id],
)
grammar = xgr.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)

prompts = tokenizer(["KING:\n", "The king and his year:\n"], padding=True, padding_side="left", return_tensors="pt")
for options in ({}, {"do_sample": True, "seed": 7}):
    ids = model.generate(**prompts, max_new_tokens=64, logits_processor=[LogitsProcessor(grammar)], **options)
    for text in tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True):
        print(text)
        found = json.loads(text)
        assert found["king"] in ("Richard", "Henry", "Edward") and found["year"] in (1399, 1413, 1483)
