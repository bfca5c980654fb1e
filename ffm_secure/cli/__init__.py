"""The command line."""


def main() -> None:
    """Run the command line; what it needs is imported when it is called."""
    from ffm_secure.cli.app import main as run

    run()


__all__ = ["main"]
