"""Labels of a language model: a token at each position, or nothing."""

IGNORED = -100
"""The label of a position where nothing is to be predicted; torch's cross entropy leaves it out."""
