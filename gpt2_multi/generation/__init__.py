"""All of generation that has no tensor: options, rules, texts, and the specification in NumPy."""
