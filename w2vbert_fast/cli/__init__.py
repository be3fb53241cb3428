"""The command line, `w2vbert-fast`: the app, and a file for each command."""

from w2vbert_fast.cli.app import main

__all__ = ["main"]
