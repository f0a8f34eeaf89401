"""What every backend refuses before it loads anything."""

import pytest

from engram_core import InputError
from engram_core.training import checks


def test_a_tracker_needs_one_of_its_packages(monkeypatch):
    there = {"tensorboardX"}
    monkeypatch.setattr(checks, "find_spec", lambda name: name if name in there else None)
    checks.check_tracker("none")
    checks.check_tracker("tensorboard")
    with pytest.raises(InputError, match="tracker wandb needs the package wandb; install it, or leave --tracker out"):
        checks.check_tracker("wandb")
    there.clear()
    with pytest.raises(InputError, match="tracker tensorboard needs the package tensorboard;"):
        checks.check_tracker("tensorboard")


def test_a_run_folder_is_no_file(tmp_path):
    checks.check_run_folder(tmp_path)
    checks.check_run_folder(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file, and the run needs a folder of that name"):
        checks.check_run_folder(tmp_path / "file")
