"""`python -m momatch` is the command `momatch`."""

import sys

from momatch.cli import main

sys.exit(main())
