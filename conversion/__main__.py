"""`python -m gpt2_multi_conversion`, and in a checkout `python -m conversion`."""

from .cli import main

main(prog_name=f"python -m {__package__}")
