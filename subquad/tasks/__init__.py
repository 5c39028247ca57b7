"""Tasks: where a comparison gets its examples from. Numpy only, no torch."""
