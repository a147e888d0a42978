"""Run the survey from the command line."""

import sys

from survey.families import main

if __name__ == "__main__":
    sys.exit(main())
