"""Weighted means of values, channel by channel: what is left of attention without products."""
