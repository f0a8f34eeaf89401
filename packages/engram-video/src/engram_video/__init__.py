"""engram_video: memories for video generators in diffusers, backbone `wan22`.

    from engram_video import load_engram, unload_engrams

    load_engram(pipeline, "zorbit.safetensors")  # a WanPipeline, or one that makes clips of pictures
    unload_engrams(pipeline)                     # exactly as before

Names are imported when they are first used: the command line reads settings without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_video.clipsets import build_clips
    from engram_video.evaluation.clips import evaluate
    from engram_video.generation import generate
    from engram_video.settings import (
        Wan22ClipsSettings,
        Wan22EvaluateSettings,
        Wan22GenerateSettings,
        Wan22TrainSettings,
    )
    from engram_video.training.clips import train, train_together
    from engram_vision import (
        LoadedEngram,
        disable_engrams,
        enable_engrams,
        list_engrams,
        load_engram,
        set_strength,
        unload_engrams,
    )

__version__ = "0.1.0"

__all__ = [
    "LoadedEngram",
    "Wan22ClipsSettings",
    "Wan22EvaluateSettings",
    "Wan22GenerateSettings",
    "Wan22TrainSettings",
    "__version__",
    "build_clips",
    "disable_engrams",
    "enable_engrams",
    "evaluate",
    "generate",
    "list_engrams",
    "load_engram",
    "set_strength",
    "train",
    "train_together",
    "unload_engrams",
]

_HOMES = {
    "Wan22ClipsSettings": "engram_video.settings",
    "Wan22EvaluateSettings": "engram_video.settings",
    "Wan22GenerateSettings": "engram_video.settings",
    "Wan22TrainSettings": "engram_video.settings",
    "build_clips": "engram_video.clipsets",
    "evaluate": "engram_video.evaluation.clips",
    "generate": "engram_video.generation",
    "train": "engram_video.training.clips",
    "train_together": "engram_video.training.clips",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("engram_video.families")  # makes them known
    value = globals()[name] = getattr(import_module(_HOMES.get(name, "engram_vision")), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
