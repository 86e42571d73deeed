"""OpenAI's checkpoints of TensorFlow 1."""

from __future__ import annotations

from pathlib import Path

from gpt2_multi.files import containers
from gpt2_multi.files.arrays import Made
from gpt2_multi.files.hub import WEIGHTS
from gpt2_multi.files.json_files import read_json, write_json
from gpt2_multi.model import spelling
from gpt2_multi.model.config import GPT2Config
from gpt2_multi.model.formats.format import DECODERS, QUARTER, SAME, TANH, Format, Tensors, beside, settings_of

HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "n_positions", **SAME}


def _config(main: Path) -> GPT2Config | None:
    path = main.with_name("hparams.json")
    if main.with_name("config.json").exists() or not path.exists():
        return beside(main)
    return settings_of(path, read_json(path), HPARAMS)


def _read(main: Path) -> Tensors:
    return containers.read_bundle(main.with_suffix(""))


def _write(folder: Path, tensors: dict[str, Made], config: GPT2Config, _: int | str) -> None:
    containers.write_bundle(folder / "model.ckpt", tensors)
    write_json(folder / "hparams.json", {name: getattr(config, ours) for name, ours in HPARAMS.items()})
    text = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    (folder / "checkpoint").write_text(text, encoding="utf-8")
    config.save_pretrained(folder)


OPENAI = Format(
    "OpenAI's TensorFlow 1 checkpoint", spelling.OPENAI, ("model.ckpt.index", "model.ckpt-[0-9]*.index"),
    WEIGHTS["openai"], _read, _write, _config, TANH, QUARTER, DECODERS, ("*.index",),
)  # fmt: skip
