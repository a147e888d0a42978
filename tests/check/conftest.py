"""Put this folder on the import path, so that mutants and third-party methods can be named as `module:Class`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
