"""Train a LoRA adapter with PEFT, save it, load it onto a fresh model, and merge it."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
batch = tokenizer(["ROMEO:\nBut, soft! what light", "JULIET:\nO Romeo!"], padding=True, return_tensors="pt")

config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"])
model = get_peft_model(GPT2LMHeadModel.from_pretrained("demo"), config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(losses)
assert losses[-1] < losses[0] - 0.5
model.save_pretrained("adapter")

again = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained("demo"), "adapter")
greedy = {"attention_mask": batch["attention_mask"], "max_new_tokens": 8}
ids = model.eval().generate(input_ids=batch["input_ids"], **greedy)
assert torch.equal(again.generate(input_ids=batch["input_ids"], **greedy), ids)
merged = again.merge_and_unload()
assert isinstance(merged, GPT2LMHeadModel)
assert torch.allclose(merged(**batch).logits, model(**batch).logits, atol=1e-3)
