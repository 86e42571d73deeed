"""Export to ONNX, and compute with onnxruntime: other batches and lengths than those of the export."""

import numpy as np
import onnxruntime
import torch

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo").eval()
batch = tokenizer(["ROMEO:", "What say you, my lord?"], padding=True, return_tensors="pt")


class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.n_positions)}
inputs = (batch["input_ids"], batch["attention_mask"])
torch.onnx.export(Logits(), inputs, "gpt2.onnx", dynamo=True, dynamic_shapes=(axes, axes))

session = onnxruntime.InferenceSession("gpt2.onnx")
other = tokenizer(["To be, or not to be", "that", "is the question"], padding=True, return_tensors="pt")
for given in (batch, other):
    (found,) = session.run(None, {name: given[name].numpy() for name in ("input_ids", "attention_mask")})
    with torch.no_grad():
        expected = model(**given).logits.numpy()
    print(np.abs(found - expected).max())
    assert np.allclose(found, expected, atol=1e-3)
