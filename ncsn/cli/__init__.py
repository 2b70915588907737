"""The command line: parse, call one function of `ncsn.steps`, print. Heavy imports wait until a command needs them."""

from ncsn.cli.app import app, main

__all__ = ["app", "main"]
