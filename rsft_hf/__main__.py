"""`python -m rsft_hf`: the command line."""

import sys

from rsft_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
