"""`python -m attacks`: the command line of the attack suite."""

import sys

from attacks.command import main

if __name__ == "__main__":
    sys.exit(main())
