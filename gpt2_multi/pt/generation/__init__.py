"""Generation in PyTorch."""
