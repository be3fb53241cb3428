"""`python -m tools.verify`."""

import sys

from tools.verify.races import main

if __name__ == "__main__":
    sys.exit(main())
