"""The parameters of a PyTorch model: first values, files, places, quantization, and parts in several processes."""
