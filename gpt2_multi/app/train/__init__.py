"""Training by one command: a plan, an engine of a framework that computes it, and the loop between them."""
