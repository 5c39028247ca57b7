"""Combiner: plans of regions, their summaries, and attention over them."""
