"""Scripts that measure in a process of their own, so that nothing that came before counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_script(script: Path, *arguments: str) -> str:
    """Run a script, which finds the modules beside this one, and return what it prints.

    Raises:
        RuntimeError: it fails; with what it said.
    """
    # Nothing is looked up on the hub: all that is loaded is here.
    paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed with status {done.returncode}:\n{done.stderr}")
    return done.stdout
