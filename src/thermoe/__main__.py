"""`python -m thermoe`."""

from thermoe.cli import main

main()
