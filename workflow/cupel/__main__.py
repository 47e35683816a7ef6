"""`python -m cupel`."""

import sys

from cupel.own.cli import main

sys.exit(main())
