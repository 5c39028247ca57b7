"""Attention to a memory of earlier segments, by relative positions, and what becomes of the oldest of it."""
