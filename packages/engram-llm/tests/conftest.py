"""Makes the shared modules beside this file importable, wherever the folder lies.

With `--import-mode=importlib` pytest adds nothing to `sys.path`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
