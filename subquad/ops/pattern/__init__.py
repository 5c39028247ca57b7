"""Exact softmax attention over any pattern: the request, the compiler, the pieces it compiles to, the backends."""
