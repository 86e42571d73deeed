"""Texts of any size to arrays of ids, block by block, on all cores and in bounded memory."""
