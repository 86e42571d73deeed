"""Ask captum which tokens of a text what follows comes from: by taking words away, and by gradients."""

import torch
from captum.attr import (
    FeatureAblation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo").eval()
text = TextTokenInput("ROMEO:\nWhat say you, my", tokenizer)

ablated = LLMAttribution(FeatureAblation(model), tokenizer).attribute(text, target=" lord")
print(dict(zip(ablated.input_tokens, ablated.seq_attr.tolist(), strict=True)))
ids = tokenizer("ROMEO:\nWhat say you, my lord", return_tensors="pt").input_ids
new = len(tokenizer(" lord").input_ids)
chosen = model(ids).logits.log_softmax(-1)[0, -new - 1 : -1].gather(-1, ids[0, -new:, None]).sum()
without = ids.clone()
without[0, -new - 1] = 0  # " my", in whose place captum puts the token of id 0
other = model(without).logits.log_softmax(-1)[0, -new - 1 : -1].gather(-1, ids[0, -new:, None]).sum()
assert torch.isclose(ablated.seq_attr[-1], (chosen - other).detach(), atol=1e-4)

gradients = LLMGradientAttribution(LayerIntegratedGradients(model, model.transformer.wte), tokenizer)
shares = gradients.attribute(text, target=" lord", n_steps=50).seq_attr
assert shares.shape == ablated.seq_attr.shape and shares.abs().max() > 0
