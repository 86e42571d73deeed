"""Look into the model and change what it computes, with nnsight."""

import torch
from nnsight import NNsight

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
plain = GPT2LMHeadModel.from_pretrained("demo").eval()
ids = tokenizer("ROMEO:\nWhat say you, my", return_tensors="pt").input_ids
expected = plain(ids, output_hidden_states=True)

model = NNsight(plain)
with model.trace(ids):
    hidden = model.transformer.h[1].output[0].save()
    logits = model.lm_head.output.save()
print(hidden.shape, logits.shape)
assert torch.allclose(logits, expected.logits, atol=1e-5)

with model.trace(ids):
    model.transformer.h[1].mlp.output[:] = 0
    without = model.output.logits.save()
assert not torch.allclose(without, expected.logits, atol=1e-2)
