"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once."""

from mrp_lens.cli.app import main

__all__ = ["main"]
