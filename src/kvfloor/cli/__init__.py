"""Provide the command `kvfloor`: parse the command line, run the subcommand, print the result."""

from kvfloor.cli.commands import app, main

__all__ = ["app", "main"]
