"""What the demo of clips counts, and the figures and failures that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engram_core import Adapter, ClipsReport, TrainReport
from engram_vision.demo.measures import Tally, base_figure, cost_figures, exact_figures, list_broken
from engram_vision.demo.page import Figure

__all__ = ["Measures", "is_mostly", "list_failures", "list_figures"]

_IDENTITY_BAR, _SCENE_BAR, _MOTION_BAR, _DROP_BAR = 0.8, 0.1, 0.1, 0.1
_PART = 4  # the first and last of so many parts of a clip are compared


@dataclass(slots=True, eq=False)
class Measures:
    """Everything that is counted.

    Attributes:
        made: clips that were learned from and show their character.
        identity: clips in new scenes and motions that show the character, by variant.
        described: clips of the base model that show the character when its looks are spelled out.
        first: frames of the first quarters of the clips with the engram that show the character.
        last: likewise, of the last quarters.
        scene: clips that show the scene of the prompt, by variant.
        motion: clips that show the motion of the prompt, by variant.
        pair: clips that show both characters, by variant.
        merged_equal: clips of the merged file with the bytes of the single one's.
        control_equal: clips without a trigger with the bytes of the base model's.
        states_equal: text states without a trigger with the bytes of the base model's.
    """

    made: Tally = field(default_factory=Tally)
    identity: dict[str, Tally] = field(default_factory=dict)
    described: Tally = field(default_factory=Tally)
    first: Tally = field(default_factory=Tally)
    last: Tally = field(default_factory=Tally)
    scene: dict[str, Tally] = field(default_factory=dict)
    motion: dict[str, Tally] = field(default_factory=dict)
    pair: dict[str, Tally] = field(default_factory=dict)
    merged_equal: Tally = field(default_factory=Tally)
    control_equal: Tally = field(default_factory=Tally)
    states_equal: Tally = field(default_factory=Tally)

    def count_quarters(self, seen: Sequence[bool]) -> None:
        """Count the frames of a clip's first and last quarter.

        Args:
            seen: for each frame, whether it shows the character.
        """
        quarter = max(1, len(seen) // _PART)
        for tally, part in ((self.first, seen[:quarter]), (self.last, seen[-quarter:])):
            for is_seen in part:
                tally.add(is_seen)


def is_mostly(flags: Sequence[bool]) -> bool:
    """Return whether more than half of the frames are as asked."""
    return 2 * sum(flags) > len(flags)


def list_failures(measures: Measures) -> tuple[str, ...]:
    """Return the exact promises that did not hold; the shares are figures, not promises."""
    return list_broken(
        {
            "clips without a trigger differ from the base model's": measures.control_equal,
            "text states without a trigger differ from the base model's": measures.states_equal,
            "clips of the merged file differ from those of the single one": measures.merged_equal,
        }
    )


def list_figures(
    measures: Measures,
    clips: Mapping[str, ClipsReport],
    reports: Mapping[str, TrainReport],
    merged: Adapter,
    seconds: float,
) -> tuple[Figure, ...]:
    """Return the figures of the page, the ones with a bar first.

    Args:
        measures: what was counted.
        clips: how the clips were made, by character.
        reports: how they were learned, by character.
        merged: the file of all characters.
        seconds: in all.
    """
    engram, base = measures.identity["engram"], measures.identity["base"]
    drop = measures.first.share - measures.last.share
    return (
        Figure(
            label="Identity in new scenes and motions",
            value=str(engram),
            bar=f"at least {_IDENTITY_BAR:.2f}",
            met=engram.share >= _IDENTITY_BAR,
            explanation="Clips in most frames of which the judge finds the character, every attribute right.",
        ),
        base_figure(base),
        Figure(
            label="Identity from first to last",
            value=f"{measures.first.share:.2f} to {measures.last.share:.2f}",
            bar=f"drops by at most {_DROP_BAR:.2f}",
            met=drop <= _DROP_BAR,
            explanation="Frames that show the character: of the clips' first quarters, and of their last.",
        ),
        _compare("Scene obeyed", measures.scene, _SCENE_BAR, "scene, in most frames,"),
        _compare("Motion obeyed", measures.motion, _MOTION_BAR, "motion"),
        *exact_figures("clips", measures.control_equal, measures.states_equal, measures.merged_equal),
        Figure(
            label="Spelled out in words",
            value=str(measures.described),
            explanation="Clips of the base model that show the character when the prompt describes all its looks "
            "instead of naming it: how well the model can draw it at all.",
        ),
        Figure(
            label="Both in one prompt",
            value=f"{measures.pair['merged']}, described {measures.pair['base, described'].share:.2f}",
            explanation="Clips in most frames of which the judge finds both, each in its place. Described: without "
            "engrams, all their looks spelled out in words the model knows.",
        ),
        Figure(
            label="The clips learned from",
            value=str(measures.made),
            explanation="Clips made of the pictures in most frames of which the judge finds the character. What they "
            "show is what is learned.",
        ),
        Figure(
            label="Making the clips",
            value=", ".join(f"{report.seconds:.0f} s" for report in clips.values()),
            explanation="One character after the other, by the same frozen model.",
        ),
        *cost_figures("clips", reports, merged, seconds, "Making clips, training, merging, drawing and measuring."),
    )


def _compare(label: str, found: Mapping[str, Tally], bar: float, what: str) -> Figure:
    engram, base = found["engram"], found["base"]
    return Figure(
        label=label,
        value=f"{engram.share:.2f} (base {base.share:.2f})",
        bar=f"at most {bar:.2f} below the base",
        met=engram.share >= base.share - bar,
        explanation=f"Clips in which the judge finds the {what} that the prompt asks for.",
    )
