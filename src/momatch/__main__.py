"""`python -m momatch` is the command `momatch`."""

import sys

from momatch.cli.main import main

sys.exit(main())
