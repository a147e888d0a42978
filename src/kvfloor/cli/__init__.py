"""Parse the command line, run the command, print the result."""

from kvfloor.cli.commands import app, main

__all__ = ["app", "main"]
