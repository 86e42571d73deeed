"""`python -m gpt2_multi.conversion`."""

from gpt2_multi.conversion.cli import main

main(prog_name="python -m gpt2_multi.conversion")
