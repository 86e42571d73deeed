"""nanoGPT: its model written plainly, as its README has it, with a loop in plain PyTorch; nothing is taken from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.pt import PyTorch

KERNELS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # which the files have as (in, out)


class Attention(nn.Module):
    """Causal attention of all heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two products, and GELU between them: by tanh as GPT-2's weights want it, where nanoGPT has the exact one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The model, called as those of transformers are."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["n_embd"]
        self.wte, self.wpe = nn.Embedding(config["vocab_size"], width), nn.Embedding(config["n_positions"], width)
        self.h = nn.ModuleList(Block(width, config["n_head"]) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """The loss of the next tokens: (B, T) each."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1]))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        targets = F.pad(labels[:, 1:], (0, 1), value=-1)  # as its files of data have them
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1))


class NanoGPT(PyTorch):
    """Its model under the weights of a folder."""

    package = "nanoGPT"

    def load(self, folder: Path) -> None:
        import json

        from safetensors.torch import load_file

        self.model = GPT(json.loads((folder / "config.json").read_text("utf-8")))
        found = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
        kernels = {name: x.T.contiguous() for name, x in found.items() if name.endswith(KERNELS)}
        self.model.load_state_dict(found | kernels)
