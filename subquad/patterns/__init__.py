"""Patterns of who attends whom, and their algebra."""

from subquad.patterns.bands import Causal as Causal
from subquad.patterns.bands import Dilated as Dilated
from subquad.patterns.bands import Log as Log
from subquad.patterns.bands import Ngram as Ngram
from subquad.patterns.bands import Strided as Strided
from subquad.patterns.bands import Window as Window
from subquad.patterns.blocks import Block as Block
from subquad.patterns.blocks import BlockWindow as BlockWindow
from subquad.patterns.blocks import Random as Random
from subquad.patterns.pattern import Pattern as Pattern
from subquad.patterns.pattern import Tile as Tile
from subquad.patterns.tokens import Columns as Columns
from subquad.patterns.tokens import Documents as Documents
from subquad.patterns.tokens import Global as Global
from subquad.patterns.tokens import Sink as Sink
