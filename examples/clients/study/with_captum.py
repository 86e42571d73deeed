"""Ask captum which tokens of a text the next one comes from, by gradients along a path from an empty text."""

import torch
from captum.attr import LayerIntegratedGradients

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo").eval()
ids = tokenizer("ROMEO:\nWhat say you, my", return_tensors="pt").input_ids
empty = torch.full_like(ids, tokenizer.eos_token_id)
target = int(model(ids).logits[0, -1].argmax())

gradients = LayerIntegratedGradients(lambda ids: model(ids).logits[:, -1], model.transformer.wte)
shares, error = gradients.attribute(ids, empty, target=target, n_steps=100, return_convergence_delta=True)
for token, share in zip(tokenizer.convert_ids_to_tokens(ids[0].tolist()), shares[0].sum(-1).tolist(), strict=True):
    print(f"{token:>10} {share:+.3f}")
gain = model(ids).logits[0, -1, target] - model(empty).logits[0, -1, target]
assert shares.shape == (*ids.shape, model.config.n_embd)
assert abs(float(shares.sum() - gain)) < 0.1, (shares.sum(), gain, error)
