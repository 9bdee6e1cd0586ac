"""`python -m raydistil`, as jobs submitted to a cluster call it."""

from raydistil.cli import main

main()
