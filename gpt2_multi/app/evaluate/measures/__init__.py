"""What is measured of documents: perplexity, tasks, and what the model goes on with."""
