"""`python -m cratescope` is `cratescope`."""

from cratescope.cli import main

main()
