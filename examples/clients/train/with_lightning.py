"""Fine-tune in a LightningModule, with its checkpoints."""

import lightning
import torch
from torch.utils.data import DataLoader

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

TEXTS = ["ROMEO:\nBut, soft! what light through yonder window breaks?", "JULIET:\nO Romeo, Romeo!"] * 8


class LanguageModel(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = GPT2LMHeadModel.from_pretrained("demo")

    def training_step(self, batch, _):
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


tokenizer = GPT2Tokenizer.from_pretrained("demo")
loader = DataLoader(TEXTS, batch_size=4, collate_fn=lambda texts: tokenizer(texts, padding=True, return_tensors="pt"))
module = LanguageModel()
trainer = lightning.Trainer(max_epochs=4, accelerator="cpu", logger=False, default_root_dir="lightning")
trainer.fit(module, loader)
assert float(trainer.callback_metrics["loss"]) < 0.5, trainer.callback_metrics
trainer.save_checkpoint("lightning.ckpt")
again = LanguageModel.load_from_checkpoint("lightning.ckpt")
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))
