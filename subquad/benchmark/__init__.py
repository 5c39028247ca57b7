"""Proofs of mechanisms, measurements of their speed and memory, and what follows from them: a recommendation."""
