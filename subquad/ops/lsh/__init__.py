"""Attention among vectors that hash into the same buckets."""
