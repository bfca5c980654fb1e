"""Let `python -m ffm_secure` be the command line."""

from ffm_secure.cli.app import main

if __name__ == "__main__":
    main()
