"""Attention over the largest scores of every query."""
