"""Parse the command line, call what it asks for, print the result."""

from kvfloor.cli.commands import app, main

__all__ = ["app", "main"]
