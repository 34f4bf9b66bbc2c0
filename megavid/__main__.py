"""``python -m megavid`` is the ``megavid`` command."""

import sys

from megavid.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
