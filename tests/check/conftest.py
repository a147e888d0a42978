"""The mutants and the third party's methods are imported by name, as `module:Class`, from this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
