"""What a run begins from, or goes on from."""
