"""`python -m graftlm` is `graft`."""

from graftlm.cli.main import main

main()
