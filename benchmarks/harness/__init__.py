"""What every benchmark shares: rows and rounds, tables and pictures, models, and how fast memory is read."""

from benchmarks.harness.rows import OURS, PeerError, Row, compare, rounds

__all__ = ["OURS", "PeerError", "Row", "compare", "rounds"]
