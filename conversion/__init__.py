"""Every GPT-2 checkpoint there is, in and out, without a framework: see `open`, `convert`, `inspect` and `verify`.

An application above the library, which never imports it: installed as `gpt2_multi_conversion`, and run from a checkout
by `python -m conversion`.
"""

from gpt2_multi.model.checkpoint import Checkpoint, open

from .converting import ConversionReport, convert
from .inspection import Inspection, inspect
from .verification import Verdict, verify

__all__ = ["Checkpoint", "ConversionReport", "Inspection", "Verdict", "convert", "inspect", "open", "verify"]
