"""The containers of tensors that checkpoints come in; no code in a file is ever run."""
