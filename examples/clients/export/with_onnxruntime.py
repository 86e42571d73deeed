"""Export to ONNX by both exporters, and compute with onnxruntime: other sizes than those of the export, and a mask."""

from itertools import product

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

traced = GPT2LMHeadModel.from_pretrained("demo", torchscript=True, use_cache=False).eval()
names = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "logits")}
torch.onnx.export(
    traced, (), "traced.onnx", kwargs=dict(batch), dynamo=False,
    input_names=["input_ids", "attention_mask"], output_names=["logits"], dynamic_axes=names,
)  # fmt: skip

other = tokenizer(["To be, or not to be", "that", "is the question"], padding=True, return_tensors="pt")
for file, given in product(("gpt2.onnx", "traced.onnx"), (batch, other)):
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {name: given[name].numpy() for name in ("input_ids", "attention_mask")})
    with torch.no_grad():
        expected = model(**given).logits.numpy()
    print(np.abs(found - expected).max())
    assert np.allclose(found, expected, atol=1e-3)
