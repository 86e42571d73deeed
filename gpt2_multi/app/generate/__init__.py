"""`gpt2-multi generate`: texts in a shell, from and to files, and at a prompt."""
