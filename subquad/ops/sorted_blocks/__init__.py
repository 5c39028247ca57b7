"""Attention of blocks to the blocks sorted to their places."""
