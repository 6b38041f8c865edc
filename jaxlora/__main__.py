"""``python -m jaxlora``: the command line."""

import sys

from jaxlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
