"""`python -m raysweep`: the command line."""

import sys

from raysweep.cli import main

sys.exit(main())
