"""The program that measures a model: perplexity of texts, and tasks of choice."""
