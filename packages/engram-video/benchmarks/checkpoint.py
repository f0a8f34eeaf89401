"""The tiny checkpoint that is measured: the one that ships, or one that `ENGRAM_VIDEO_TINY` names."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from engram_video.shipped import checkpoint_folder, judge_folder, motion_judge_folder
from engram_vision.shipped import TINY

VARIABLE = "ENGRAM_VIDEO_TINY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A tiny pipeline and what judges its clips.

    Attributes:
        model: as `--model` takes it.
        folder: where the pipeline is.
        judge: folder of the judge of frames.
        motions: folder of the judge of motions.
    """

    model: str
    folder: Path
    judge: Path
    motions: Path

    @classmethod
    def find(cls) -> Checkpoint:
        """Return the one to measure; raises InputError where none is there."""
        named = os.environ.get(VARIABLE)
        if named is None:
            return cls(model=TINY, folder=checkpoint_folder(), judge=judge_folder(), motions=motion_judge_folder())
        root = Path(named).resolve()
        judge = root / "judge"
        return cls(model=str(root / "wan22"), folder=root / "wan22", judge=judge, motions=judge / "motion")

    def fingerprint(self) -> str:
        """Return a digest over all files, of the judges too: figures of other ones are other figures."""
        digest = hashlib.sha256()
        for root in (self.folder, self.judge):
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()[:12]
