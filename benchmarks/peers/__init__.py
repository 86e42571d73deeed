"""Who is measured: each a class that loads a folder and answers calls, in a process of its own; see `workers`."""
