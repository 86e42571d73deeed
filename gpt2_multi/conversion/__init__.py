"""Every GPT-2 checkpoint there is, in and out, without a framework: see `open`, `convert`, `inspect` and `verify`."""

from gpt2_multi.conversion.checkpoint import Checkpoint, open, read_config, read_weights
from gpt2_multi.conversion.convert import Report, convert

__all__ = ["Checkpoint", "Report", "convert", "open", "read_config", "read_weights"]
