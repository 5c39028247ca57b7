"""Networks side by side, each for its own tokens, and the choice among them."""
