"""Fine-tune with transformers' Trainer: it saves on the way, resumes, and ends with the best model."""

import numpy as np
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.pt import GPT2LMHeadModel

tokenizer = GPT2Tokenizer.from_pretrained("demo")
tokenizer.pad_token = tokenizer.eos_token
texts = ["ROMEO: what light is it?", "JULIET: O", "the king of France is here and gone", "hello, my friend"] * 4
rows = [dict(tokenizer(text)) for text in texts]


def trainer(model):
    arguments = TrainingArguments(
        "out", max_steps=6, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True, learning_rate=1e-3,
        bf16=True, neftune_noise_alpha=5.0, use_cpu=True, report_to=[],
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip


model = GPT2LMHeadModel.from_pretrained("demo")
run = trainer(model)
before = run.evaluate()["eval_loss"]
run.train()
assert run.evaluate()["eval_loss"] < before

resumed = trainer(GPT2LMHeadModel.from_pretrained("demo"))
resumed.train(resume_from_checkpoint="out/checkpoint-4")
assert resumed.state.global_step == 6

predictions = run.predict(rows[:4])
assert isinstance(predictions.predictions, np.ndarray)
again = GPT2LMHeadModel.from_pretrained(run.state.best_model_checkpoint, config=model.config)
assert again.generate("ROMEO:", tokenizer=tokenizer) == model.eval().generate("ROMEO:", tokenizer=tokenizer)
