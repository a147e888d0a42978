"""Run the command line as `python -m kvfloor`."""

from kvfloor.cli import main

if __name__ == "__main__":
    main()
