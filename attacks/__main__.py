"""`python -m attacks`: the command line of the suite; `python -m attacks.<name>`: one attack of it."""

import sys

from attacks.command import main, run_one

if __name__ == "__main__":
    assert __spec__ is not None
    name = __spec__.name.rpartition(".")[2]
    sys.exit(main() if name == "__main__" else run_one(name))
