"""Fine-tune with TRL's SFTTrainer, whole and by LoRA; its tokenizer has to be one of transformers."""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2TokenizerFast
from trl import SFTConfig, SFTTrainer

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

texts = ["ROMEO:\nBut, soft! what light", "JULIET:\nO Romeo!"] * 8
model = GPT2LMHeadModel.from_pretrained("demo")
model.save_pretrained("start")
GPT2Tokenizer.from_pretrained("demo").save_pretrained("start")
tokenizer = GPT2TokenizerFast.from_pretrained("start")
tokenizer.pad_token = tokenizer.eos_token

options = {"max_steps": 8, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "logging_steps": 1}
for adapter in (None, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"])):
    trainer = SFTTrainer(
        model=GPT2LMHeadModel.from_pretrained("start"),
        args=SFTConfig(output_dir="trained", report_to=[], use_cpu=True, bf16=False, save_strategy="no", **options),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(losses)
    assert losses[-1] < losses[0] - 0.5

prompt = tokenizer("ROMEO:", return_tensors="pt").to(trainer.model.device)
assert trainer.model.generate(**prompt, max_new_tokens=5).shape[1] == prompt["input_ids"].shape[1] + 5
assert torch.isfinite(trainer.model(**prompt).logits).all()
