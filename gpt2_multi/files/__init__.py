"""Bytes: files and folders, whatever is in them."""
