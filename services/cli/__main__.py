"""`python -m services.cli` is the `postroad` command."""

from services.cli.main import main

main()
