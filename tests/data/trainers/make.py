"""Made the files beside it: one small GPT-2 as programs that train save it.

    python -m venv venv && venv/bin/pip install torch lightning trl==0.23.1 transformers==4.57.6
    venv/bin/python make.py FOLDER

DeepSpeed's file has the layout of its checkpoints, without DeepSpeed: that wants a GPU.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import GPT2Config, GPT2LMHeadModel
from trl import AutoModelForCausalLMWithValueHead

SIZES = dict(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)
CONFIG = GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)


class Task(lightning.LightningModule):
    """As most people write it: the model is an attribute, and what it was told is kept."""

    def __init__(self, config, options):
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.compile(GPT2LMHeadModel(config), backend="eager")

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.0)


def main(folder):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "reference")

    options = argparse.Namespace(where=Path("data"), device=torch.device("cpu"), sizes={1, 2}, odd={(1, 2): None})
    task = Task(CONFIG, options)
    task.model._orig_mod.load_state_dict(model.state_dict())
    keep = ModelCheckpoint(dirpath=folder / "lightning", save_last=True, save_top_k=0)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False
    )
    trainer.fit(task, torch.utils.data.DataLoader(torch.randint(0, 16, (2, 8)), batch_size=2))

    head = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "reference"))
    head.save_pretrained(str(folder / "trl"))

    wrapped = torch.nn.DataParallel(torch.compile(GPT2LMHeadModel(CONFIG), backend="eager"))
    wrapped.module._orig_mod.load_state_dict(model.state_dict())
    blocks = wrapped.module._orig_mod.transformer.h
    blocks[1] = torch.compile(blocks[1], backend="eager")
    torch.save({"epoch": 1, "model_state_dict": wrapped.state_dict(), "args": options}, folder / "compiled.pt")

    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    state = {"module": halves, "buffer_names": [], "optimizer": None, "param_shapes": [{"w": torch.Size([2])}]}
    torch.save({**state, "frozen_param_shapes": None, "ds_version": "0.17.0"}, folder / "mp_rank_00_model_states.pt")


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    target = Path(sys.argv[1])
    shutil.rmtree(target / "lightning", ignore_errors=True)
    main(target)
