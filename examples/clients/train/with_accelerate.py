"""Train in a loop of one's own under accelerate, and save and load with its calls."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

TEXTS = ["ROMEO:\nBut, soft! what light through yonder window breaks?", "JULIET:\nO Romeo, Romeo!"] * 4

tokenizer = GPT2Tokenizer.from_pretrained("demo")
model = GPT2LMHeadModel.from_pretrained("demo")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(TEXTS, batch_size=4, collate_fn=lambda texts: tokenizer(texts, padding=True, return_tensors="pt"))

accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
losses = []
model.train()
for _ in range(4):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch, labels=batch["input_ids"]).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
print(losses)
assert losses[-1] < losses[0] - 0.5

accelerator.unwrap_model(model).save_pretrained(
    "accelerated", is_main_process=accelerator.is_main_process, save_function=accelerator.save
)
again = GPT2LMHeadModel.from_pretrained("accelerated")
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
