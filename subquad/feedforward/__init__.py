"""The channel mixers: one file, one mechanism. Importing this package enters all of them in the registry."""

from subquad.feedforward import glu as glu
from subquad.feedforward import mlp as mlp
from subquad.feedforward import moe as moe
from subquad.feedforward import switch as switch
