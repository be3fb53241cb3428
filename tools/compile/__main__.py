"""`python -m tools.compile`."""

import sys

from tools.compile.aot import main

if __name__ == "__main__":
    sys.exit(main())
