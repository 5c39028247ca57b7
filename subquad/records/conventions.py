"""What the records and those who make them agree on; no pydantic, so that a help text can load it."""

DENSE = "full"
"""The mixer with which all others are compared."""

MAX_SAMPLES = 200
"""Samples of a measurement; no more fit into a record."""
