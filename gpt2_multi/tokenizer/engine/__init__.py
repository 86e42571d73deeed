"""Ordinary text: how it is cut into words, how words are merged to tokens, and how merges are learned."""
