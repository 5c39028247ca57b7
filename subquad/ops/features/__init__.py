"""Attention whose scores are products of features: sums of keys times values in place of a matrix."""
