"""Where the parts of a frozen model are while a concept is trained: on the device only what the steps need."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from engram_core import Watcher
from engram_core.torch.offload import BlockOffload
from engram_vision.memory import offload_blocks
from engram_vision.settings import TrainSettings

__all__ = ["Placement", "peak_memory_mb"]


class Placement:
    """Puts the denoiser on the device, and everything else away."""

    def __init__(self, pipeline: Any, settings: TrainSettings, device: torch.device, watcher: Watcher) -> None:
        """Place the parts for the first step.

        Args:
            pipeline: the frozen model, after its encoders have done their work.
            settings: whether memory is low, and whether there will be previews.
            device: where the steps run.
            watcher: told what has no effect.
        """
        self._pipeline, self._settings, self._device = pipeline, settings, device
        self._offload: BlockOffload | None = None
        self.free_encoders()
        denoiser = getattr(pipeline, settings.family.denoiser)
        if settings.low_memory and device.type != "cpu":
            self._offload = BlockOffload(offload_blocks(denoiser), device, model=denoiser)
            self._offload.attach()
            return
        if settings.low_memory:
            watcher.note("low_memory has no effect on the CPU: there is no other memory to move blocks to")
        if settings.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            denoiser.train()  # checkpointing is off in evaluation; these models have no dropout
        denoiser.to(device)

    def free_encoders(self) -> None:
        """Take what the steps do not need off the device, and out of memory where no preview needs it."""
        for name in self._idle():
            if self._settings.preview_every:
                getattr(self._pipeline, name).to("cpu")
            else:
                setattr(self._pipeline, name, None)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def bring_back(self) -> None:
        """Put everything on the device that drawing a preview needs."""
        for name in self._idle():
            getattr(self._pipeline, name).to(self._device)

    def end(self) -> None:
        """Undo what offloading changed."""
        if self._offload is not None:
            self._offload.detach()

    def _idle(self) -> list[str]:
        """Return what the pipeline calls the modules that no step needs."""
        names = [name for name in self._settings.family.modules() if name != self._settings.family.denoiser]
        return [name for name in names if getattr(self._pipeline, name) is not None]


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process on a device, in megabytes; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
