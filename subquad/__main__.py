"""`python -m subquad`: the command line."""

import sys

from subquad.cli.main import main

sys.exit(main())
