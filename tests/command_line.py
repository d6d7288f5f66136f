"""The `hfpos` command in this process."""

import sys

from hfpos import cli


def run(monkeypatch, *arguments) -> int:
    """The exit code of `hfpos ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["hfpos", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code or 0
    return 0
