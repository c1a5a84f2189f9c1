"""`python -m vizoo` is the command `vizoo`."""

from __future__ import annotations

import sys

from vizoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
