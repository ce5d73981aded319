"""`python -m app.cli` is the `headwater` script."""

from app.cli import main

main()
