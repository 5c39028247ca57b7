"""What mechanisms are made of, between the operations on tensors and the mechanisms themselves.

Bases of mixers (`HeadMixer`, and those of linear recurrences, sums of features, memories and channel mixers with
experts), the mixer with a global stream, what mixers consist of (projections, stacked experts, tables of positions,
functions that compress, buffers that stay wide), the states they carry, and the arithmetic of prices that one file of a
mechanism has no room for. Nothing here is registered.
"""
