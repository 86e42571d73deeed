"""`python -m gpt2_multi` is the command `gpt2-multi`."""

from gpt2_multi.app.cli import main

main(prog_name="gpt2-multi")
