"""engram_vision: memories for image generators in diffusers, backbones `sd15`, `sdxl` and `sd35`.

    from engram_vision import load_engram, unload_engrams

    load_engram(pipeline, "zorbit.safetensors")  # any pipeline of Stable Diffusion 1.x, XL or 3.x
    unload_engrams(pipeline)                     # exactly as before

Names are imported when they are first used: the command line reads settings without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_vision.evaluation.run import evaluate
    from engram_vision.evaluation.settings import (
        SD15EvaluateSettings,
        SD35EvaluateSettings,
        SDXLEvaluateSettings,
    )
    from engram_vision.generation import generate
    from engram_vision.loading import (
        LoadedEngram,
        disable_engrams,
        enable_engrams,
        list_engrams,
        load_engram,
        set_strength,
        unload_engrams,
    )
    from engram_vision.settings import (
        SD15GenerateSettings,
        SD15TrainSettings,
        SD35GenerateSettings,
        SD35TrainSettings,
        SDXLGenerateSettings,
        SDXLTrainSettings,
    )
    from engram_vision.training.trainer import train, train_together

__version__ = "0.1.0"

__all__ = [
    "LoadedEngram",
    "SD15EvaluateSettings",
    "SD15GenerateSettings",
    "SD15TrainSettings",
    "SD35EvaluateSettings",
    "SD35GenerateSettings",
    "SD35TrainSettings",
    "SDXLEvaluateSettings",
    "SDXLGenerateSettings",
    "SDXLTrainSettings",
    "__version__",
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
    "LoadedEngram": "engram_vision.loading",
    "disable_engrams": "engram_vision.loading",
    "enable_engrams": "engram_vision.loading",
    "list_engrams": "engram_vision.loading",
    "load_engram": "engram_vision.loading",
    "set_strength": "engram_vision.loading",
    "unload_engrams": "engram_vision.loading",
    "SD15EvaluateSettings": "engram_vision.evaluation.settings",
    "SD15GenerateSettings": "engram_vision.settings",
    "SD15TrainSettings": "engram_vision.settings",
    "SD35EvaluateSettings": "engram_vision.evaluation.settings",
    "SD35GenerateSettings": "engram_vision.settings",
    "SD35TrainSettings": "engram_vision.settings",
    "SDXLEvaluateSettings": "engram_vision.evaluation.settings",
    "SDXLGenerateSettings": "engram_vision.settings",
    "SDXLTrainSettings": "engram_vision.settings",
    "evaluate": "engram_vision.evaluation.run",
    "generate": "engram_vision.generation",
    "train": "engram_vision.training.trainer",
    "train_together": "engram_vision.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
