"""Export with torch.export: any batch, any length, and a mask."""

import torch

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo").eval()
batch = dict(tokenizer(["ROMEO:", "What say you, my lord?"], padding=True, return_tensors="pt"))
other = dict(tokenizer(["To be, or not to be", "that", "is the question"], padding=True, return_tensors="pt"))

axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.n_positions)}
program = torch.export.export(
    model, (), {**batch, "use_cache": False}, dynamic_shapes={name: axes for name in batch} | {"use_cache": None}
)
torch.export.save(program, "gpt2.pt2")
loaded = torch.export.load("gpt2.pt2").module()
for given in (batch, other):
    found, expected = loaded(**given, use_cache=False).logits, model(**given, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
