"""Attention among the members of a cluster."""
