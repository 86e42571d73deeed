"""Fine-tune GPT-2 on a text file with Keras: python examples/finetune_keras.py my.txt --out runs/mine

Run again with the same folder, it resumes after the last whole epoch, and trains no further once `--epochs` are over.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import keras
import matplotlib

matplotlib.use("Agg")  # draws files, needs no screen

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

from gpt2_multi import GPT2Tokenizer
from gpt2_multi.errors import GPT2Error
from gpt2_multi.tf import TFGPT2LMHeadModel
from gpt2_multi.tf.fit.optimizers import AdamW, CosineSchedule

HELD_OUT = 0.1
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
CHECKPOINT, BEST, HISTORY, PLOT = "checkpoint.keras", "best.weights.h5", "history.csv", "loss.svg"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune GPT-2 on a text file with Keras.")
    parser.add_argument("text", type=Path, help="UTF-8 text; its last tenth is held out")
    parser.add_argument("--model", default="demo", help="a model folder or a name, by default the one in the package")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuned"), help="folder for the model and the records")
    parser.add_argument("--epochs", type=int, default=5, help="at most, those before a resumption included")
    parser.add_argument("--patience", type=int, default=2, help="epochs without a better loss before the end")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks per update")
    parser.add_argument("--length", type=int, default=128, help="tokens per block")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="at its highest, after the warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of the order of blocks, dropout and samples")
    parser.add_argument("--policy", default="float32", choices=POLICIES, help="Keras' dtype policy")
    parser.add_argument("--sample-tokens", type=int, default=60, help="tokens of the samples before and after")
    return parser.parse_args()


def read_blocks(path: Path, tokenizer: GPT2Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The text as blocks (N, length) to learn and to hold out; SystemExit with a sentence where that cannot be."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
    ids = np.array(tokenizer(text).input_ids, np.int32)
    number = len(ids) // length
    if number < 2:
        raise SystemExit(
            f"{path}: its {len(ids)} tokens make {number} blocks of {length}, but one is needed to learn and one to "
            "hold out; give a longer text or a smaller --length"
        )
    blocks, held = ids[: number * length].reshape(number, length), max(1, round(number * HELD_OUT))
    return blocks[:-held], blocks[-held:]


def records(out: Path) -> list[dict[str, float]]:
    """The losses of every epoch so far."""
    if not (out / HISTORY).exists():
        return []
    with (out / HISTORY).open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def start(options: argparse.Namespace, updates: int) -> TFGPT2LMHeadModel:
    """The model and its optimizer, from the checkpoint if there is one."""
    if (options.out / CHECKPOINT).exists():
        return keras.saving.load_model(options.out / CHECKPOINT)
    model = TFGPT2LMHeadModel.from_pretrained(options.model, dtype=options.policy)
    rate = CosineSchedule(options.learning_rate, updates, warmup=updates // 20)
    model.compile(AdamW(rate, global_clipnorm=1.0))
    return model


def callbacks(out: Path, patience: int, best: float | None) -> list[keras.callbacks.Callback]:
    """What happens after each epoch; `best` is the least validation loss of the epochs before a resumption."""
    return [
        keras.callbacks.ModelCheckpoint(
            out / BEST, "val_loss", save_best_only=True, save_weights_only=True, initial_value_threshold=best
        ),
        keras.callbacks.ModelCheckpoint(out / CHECKPOINT),
        keras.callbacks.CSVLogger(out / HISTORY, append=True),
        keras.callbacks.EarlyStopping("val_loss", patience=patience, verbose=1),
        keras.callbacks.TerminateOnNaN(),
    ]


def sample(model: TFGPT2LMHeadModel, tokenizer: GPT2Tokenizer, prompt: np.ndarray, options: argparse.Namespace) -> str:
    """What the model makes of a prompt, the prompt included."""
    new = min(options.sample_tokens, model.config.n_positions - len(prompt))
    ids = model.generate(tf.constant(prompt[None]), max_new_tokens=new, do_sample=True, seed=options.seed)
    return tokenizer.decode(ids.numpy()[0])


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """The losses by epoch, as a picture."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    epochs = [int(row["epoch"]) + 1 for row in rows]
    for name, label, marker in (("loss", "training text", "o"), ("val_loss", "held-out text", "s")):
        axes.plot(epochs, [row[name] for row in rows], marker=marker, label=label)
    axes.set(xlabel="epoch", ylabel="loss (nats per token)", title="Fine-tuning")
    axes.set_xticks(epochs if len(epochs) <= 20 else epochs[:: len(epochs) // 10])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def train(model: TFGPT2LMHeadModel, learned: np.ndarray, held: np.ndarray, options: argparse.Namespace) -> None:
    """Fit the epochs that are left, and load the weights of the best one."""
    rows = records(options.out)
    best = min((row["val_loss"] for row in rows), default=None)
    model.fit(
        {"input_ids": learned, "labels": learned},
        validation_data=({"input_ids": held, "labels": held},),
        batch_size=options.batch_size,
        initial_epoch=len(rows),
        epochs=options.epochs,
        callbacks=callbacks(options.out, options.patience, best),
    )
    model.load_weights(options.out / BEST)


def main() -> None:
    """Fine-tune, and write the model folder with the records of the training."""
    options = arguments()
    keras.utils.set_random_seed(options.seed)
    tokenizer = GPT2Tokenizer.from_pretrained(options.model)
    learned, held = read_blocks(options.text, tokenizer, options.length)
    options.out.mkdir(parents=True, exist_ok=True)
    model = start(options, updates=options.epochs * -(-len(learned) // options.batch_size))
    prompt = held[0, : min(16, options.length // 2)]
    print(f"{len(learned)} blocks to learn, {len(held)} held out\n")
    print(f"before: {sample(model, tokenizer, prompt, options)}\n")
    train(model, learned, held, options)
    print(f"\nafter: {sample(model, tokenizer, prompt, options)}\n")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    rows = records(options.out)
    plot(rows, options.out / PLOT)
    print(f"{options.out}: held-out loss {min(row['val_loss'] for row in rows):.4f} after {len(rows)} epochs")


if __name__ == "__main__":
    try:
        main()
    except GPT2Error as error:
        raise SystemExit(str(error)) from None
