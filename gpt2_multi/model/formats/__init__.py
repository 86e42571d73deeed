"""The formats of checkpoints: what each is, how it is recognised, read and written; `table` has them all."""
