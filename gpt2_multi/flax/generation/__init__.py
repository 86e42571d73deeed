"""Generation in Flax."""
