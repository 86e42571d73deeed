"""Makes lens/bridge.pt and lens/bridge_folded.pt: the model of make.py as TransformerLens 4's TransformerBridge has it.

pip install torch "transformer_lens>=4" && python make_bridge.py
"""

from pathlib import Path

import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel

HERE = Path(__file__).parent


def main() -> None:
    """Write both files."""
    model = GPT2LMHeadModel.from_pretrained(HERE / "transformers")
    c = model.config
    sizes = {"d_model": c.n_embd, "d_head": c.n_embd // c.n_head, "n_layers": c.n_layer, "n_ctx": c.n_positions}
    kind = {"architecture": "GPT2LMHeadModel", "act_fn": "gelu_new", "device": "cpu"}
    config = TransformerBridgeConfig(**sizes, n_heads=c.n_head, d_vocab=c.vocab_size, d_mlp=4 * c.n_embd, **kind)
    bridge = TransformerBridge(model, ArchitectureAdapterFactory.select_architecture_adapter(config), tokenizer=None)
    torch.save({name: tensor.clone() for name, tensor in bridge.state_dict().items()}, HERE / "lens/bridge.pt")
    bridge.enable_compatibility_mode()  # which folds the layer norms
    torch.save(dict(bridge.state_dict()), HERE / "lens/bridge_folded.pt")


if __name__ == "__main__":
    main()
