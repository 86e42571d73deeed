"""GPT-2 for PyTorch, TensorFlow and JAX, from one configuration, one tokenizer and one table of weights."""

__version__ = "0.1.0"
