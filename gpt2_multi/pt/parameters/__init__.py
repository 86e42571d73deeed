"""The parameters of a PyTorch model: how they are cut over a mesh of processes."""
