"""What computes a plan: an engine of each framework, behind one protocol."""
