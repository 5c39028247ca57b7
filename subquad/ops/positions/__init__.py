"""Products over positions: what mixes tokens where there is no attention."""
