"""`python -m kvfloor`: the command line."""

from kvfloor.cli import main

if __name__ == "__main__":
    main()
