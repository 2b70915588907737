"""`python -m ncsn`: the same as the `ncsn` command."""

from ncsn.cli import main

main()
