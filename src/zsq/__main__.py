"""`python -m zsq`: the same as the command `zsq`."""

from zsq.cli import main

main()
