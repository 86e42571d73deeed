"""Makes the files of this folder: a GPT-2 as transformers, TransformerLens, minGPT, build-nanogpt and llm.c have it.

    pip install torch "transformer_lens<3" safetensors && python make.py

transformers and TransformerLens write their own. The other three are no packages: their files are written by their
layout alone, from what their programs say of it (minGPT's mingpt/model.py and projects/chargpt of 2022, and its model
of 2020; build-nanogpt's train_gpt2.py; llm.c's `fill_in_parameter_sizes` and `gpt2_write_to_checkpoint`), and by
nothing of gpt2_multi. `logits.safetensors` has what each computes.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
VOCAB, LENGTH, WIDTH, LAYERS, HEADS = 37, 10, 12, 2, 3
SIZES = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
Tensors = dict[str, torch.Tensor]


def model() -> GPT2LMHeadModel:
    """A GPT-2 whose every number matters."""
    torch.manual_seed(0)
    found = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for name, tensor in found.named_parameters():
            scale = "ln_" in name and name.endswith("weight")
            tensor.normal_(float(scale), 0.2 if scale else 0.1 if name.endswith("bias") else 0.3)
    return found.eval()


def linear(gpt: GPT2LMHeadModel) -> Tensors:
    """Its state dict as nn.Linear has the kernels, under the names that minGPT of 2022 and its kin share."""
    kernels = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {
        name: (tensor.T if name.endswith(kernels) else tensor).detach().clone().contiguous()
        for name, tensor in gpt.state_dict().items()
    }


def lens(gpt: GPT2LMHeadModel, folded: bool) -> HookedTransformer:
    """A HookedTransformer with its weights, processed as its from_pretrained does, or not at all."""
    sizes = {"n_layers": LAYERS, "d_model": WIDTH, "n_ctx": LENGTH, "d_head": WIDTH // HEADS, "n_heads": HEADS}
    kind = {"act_fn": "gelu_new", "normalization_type": "LNPre" if folded else "LN", "device": "cpu"}
    found = HookedTransformer(HookedTransformerConfig(**sizes, d_mlp=4 * WIDTH, d_vocab=VOCAB, **kind))
    how = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), folded)
    found.load_and_process_state_dict(convert_gpt2_weights(gpt, found.cfg), **how)
    return found


def mask() -> torch.Tensor:
    """The causal mask that Karpathy's programs keep in each layer."""
    return torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH)


def mingpt(state: Tensors) -> Tensors:
    """The state dict of minGPT since 2022, whose head is a parameter of its own: another one here."""
    masks = {f"transformer.h.{i}.attn.bias": mask() for i in range(LAYERS)}
    return {**state, **masks, "lm_head.weight": torch.randn(VOCAB, WIDTH) * 0.3}


def mingpt_2020(state: Tensors) -> Tensors:
    """The state dict of the first minGPT: Q, K and V apart, and the positions a parameter of three dimensions."""
    found = {"pos_emb": state["transformer.wpe.weight"][None], "tok_emb.weight": state["transformer.wte.weight"]}
    parts = {"ln_1": "ln1", "ln_2": "ln2", "attn.c_proj": "attn.proj", "mlp.c_fc": "mlp.0", "mlp.c_proj": "mlp.2"}
    for i in range(LAYERS):
        found[f"blocks.{i}.attn.mask"] = mask()
        for end in ("weight", "bias"):
            for ours, theirs in parts.items():
                found[f"blocks.{i}.{theirs}.{end}"] = state[f"transformer.h.{i}.{ours}.{end}"]
            apart = state[f"transformer.h.{i}.attn.c_attn.{end}"].chunk(3)
            for name, part in zip(("query", "key", "value"), apart, strict=True):
                found[f"blocks.{i}.attn.{name}.{end}"] = part.clone()
    final = {f"ln_f.{end}": state[f"transformer.ln_f.{end}"] for end in ("weight", "bias")}
    return {**found, **final, "head.weight": torch.randn(VOCAB, WIDTH) * 0.3}


@dataclass
class GPTConfig:
    """build-nanogpt's, of which it pickles an instance."""

    block_size: int = LENGTH
    vocab_size: int = VOCAB
    n_layer: int = LAYERS
    n_head: int = HEADS
    n_embd: int = WIDTH


def llmc(state: Tensors, version: int, dtype: torch.dtype) -> bytes:
    """llm.c's file: 256 int32, and the 16 tensors of its `ParameterTensors`, each for all layers."""
    padded = 128
    header = struct.pack("<256i", 20240326, version, LENGTH, VOCAB, LAYERS, HEADS, WIDTH, padded, *[0] * 248)

    def layers(name: str) -> torch.Tensor:
        return torch.stack([state[f"transformer.h.{i}.{name}"] for i in range(LAYERS)])

    tensors = [
        functional.pad(state["transformer.wte.weight"], (0, 0, 0, padded - VOCAB)),
        state["transformer.wpe.weight"],
        layers("ln_1.weight"),
        layers("ln_1.bias"),
        layers("attn.c_attn.weight"),
        layers("attn.c_attn.bias"),
        layers("attn.c_proj.weight"),
        layers("attn.c_proj.bias"),
        layers("ln_2.weight"),
        layers("ln_2.bias"),
        layers("mlp.c_fc.weight"),
        layers("mlp.c_fc.bias"),
        layers("mlp.c_proj.weight"),
        layers("mlp.c_proj.bias"),
        state["transformer.ln_f.weight"],
        state["transformer.ln_f.bias"],
    ]
    return header + b"".join(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def logits(ids: torch.Tensor, state: Tensors, exact: bool = False) -> torch.Tensor:
    """What minGPT's forward makes of ids, with its GELU of 2022 or the exact one of 2020; kernels of (out, in)."""
    at = {name: tensor.double() for name, tensor in state.items()}
    x = at["transformer.wte.weight"][ids] + at["transformer.wpe.weight"][: ids.shape[1]]

    def part(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, at[f"{name}.weight"], at[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), at[f"{name}.weight"], at[f"{name}.bias"])

    for i in range(LAYERS):
        block = f"transformer.h.{i}"
        q, k, v = part(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + part(f"{block}.attn.c_proj", y.transpose(1, 2).flatten(2))
        inner = part(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + part(f"{block}.mlp.c_proj", functional.gelu(inner, approximate="none" if exact else "tanh"))
    return norm("transformer.ln_f", x) @ at["lm_head.weight"].T


def save(name: str, value: object) -> None:
    """One file of torch.save."""
    (HERE / name).parent.mkdir(exist_ok=True)
    torch.save(value, HERE / name)


def main() -> None:
    """Write every file."""
    gpt = model()
    state, ids = linear(gpt), torch.randint(VOCAB, (2, LENGTH))
    gpt.save_pretrained(HERE / "transformers")
    hooked, folded = lens(gpt, False), lens(gpt, True)
    save("lens/model.pt", hooked.state_dict())
    save("lens/folded.pt", folded.state_dict())
    new, old = mingpt(state), mingpt_2020(state)
    save("mingpt/model.pt", new)
    settings = {"model_type": None, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": None}
    drops = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1)
    model_node = {**settings, "block_size": None, **drops}
    nodes = {"system": {"seed": 1337, "work_dir": "./out"}, "data": {"block_size": LENGTH}, "model": model_node}
    (HERE / "mingpt/config.json").write_text(json.dumps({**nodes, "trainer": {"device": "auto"}}, indent=4))
    save("mingpt_2020/model.pt", old)
    log = {"model": state, "config": GPTConfig(), "step": 5000, "val_loss": 3.25}
    save("build_nanogpt/model_05000.pt", log)
    (HERE / "llmc").mkdir(exist_ok=True)
    (HERE / "llmc/gpt2_tiny.bin").write_bytes(llmc(state, 3, torch.float32))
    (HERE / "llmc/gpt2_tiny_bf16.bin").write_bytes(llmc(state, 5, torch.bfloat16))
    found = {"ids": ids, "transformers": gpt.double()(ids).logits.detach()}
    found |= {"lens": hooked(ids).detach().double(), "mingpt": logits(ids, new)}
    found["mingpt_2020"] = logits(ids, {**state, "lm_head.weight": old["head.weight"]}, exact=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, HERE / "logits.safetensors")


if __name__ == "__main__":
    main()
