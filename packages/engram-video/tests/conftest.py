"""A whole Wan with random weights, small enough to train in a second; shared modules beside this file.

With `--import-mode=importlib` pytest adds nothing to `sys.path`.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def one_thread():
    """Compute on one thread, so that sums are made in one order and a run can be compared bit for bit."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory, one_thread):
    """Return a folder with a small model in the layout of TI2V-5B."""
    from video_builders import build_wan

    folder = tmp_path_factory.mktemp("wan22")
    build_wan().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory, one_thread):
    """Return a folder with one that reads one time for each clip, as Wan 2.1 does."""
    from video_builders import build_wan

    folder = tmp_path_factory.mktemp("wan21")
    build_wan(expand_timesteps=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(model):
    """Return a pipeline into which nothing is ever loaded."""
    from engram_video.families import WAN22
    from engram_vision.models import load_pipeline

    return load_pipeline(WAN22, str(model))


@pytest.fixture
def pipeline(base):
    """Return an equal pipeline for one test."""
    from video_builders import copy_of

    return copy_of(base)
