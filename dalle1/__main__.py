"""`python -m dalle1`: the same as the installed command."""

from dalle1.cli import main

if __name__ == "__main__":
    main()
