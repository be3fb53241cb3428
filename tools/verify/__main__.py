"""`python -m tools.verify`."""

import sys

from .races import main

if __name__ == "__main__":
    sys.exit(main())
