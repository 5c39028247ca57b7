"""The channel mixers: one file, one mechanism. Importing this package enters all of them in the registry."""

from subquad.feedforward import mlp as mlp
