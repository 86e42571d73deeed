"""Every GPT-2 checkpoint there is, in and out, without a framework: see `open`, `convert`, `inspect` and `verify`."""

from gpt2_multi.conversion.converting import Report, convert
from gpt2_multi.conversion.inspection import Inspection, inspect
from gpt2_multi.conversion.verification import Verdict, verify
from gpt2_multi.model.checkpoint import Checkpoint, open, read_config, read_weights

__all__ = [
    "Checkpoint", "Inspection", "Report", "Verdict", "convert", "inspect", "open", "read_config", "read_weights",
    "verify",
]  # fmt: skip
