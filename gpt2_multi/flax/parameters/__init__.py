"""The parameters of a Flax model: the tree that they stand in, and how it is cut over a mesh of devices."""
