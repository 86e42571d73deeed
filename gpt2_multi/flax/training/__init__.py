"""Training in Flax: losses, the state of a run, and resuming it."""
