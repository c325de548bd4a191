"""Data sets in one small shape."""
