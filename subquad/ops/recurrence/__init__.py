"""Linear recurrences that forget, in chunks."""
