"""What the demo counts, and the figures and failures that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engram_core import Adapter, TrainReport
from engram_vision.demo.page import Figure

__all__ = [
    "Measures",
    "Tally",
    "base_figure",
    "cost_figures",
    "exact_figures",
    "list_broken",
    "list_failures",
    "list_figures",
]

_IDENTITY_BAR, _BASE_BAR, _SCENE_BAR = 0.8, 0.1, 0.1


@dataclass(slots=True, eq=False)
class Tally:
    """How often something was right.

    Attributes:
        right: how often.
        count: of how many.
    """

    right: int = 0
    count: int = 0

    def add(self, is_right: bool) -> None:
        """Count one more."""
        self.right += is_right
        self.count += 1

    @property
    def share(self) -> float:
        """The share that was right; NaN before anything was counted."""
        return self.right / self.count if self.count else float("nan")

    def __str__(self) -> str:
        return f"{self.share:.2f} ({self.right} of {self.count})"


@dataclass(slots=True, eq=False)
class Measures:
    """Everything that is counted.

    Attributes:
        identity: pictures that show the character, by (variant, whether the scene is new).
        scene: pictures that show the scene of the prompt, likewise.
        pair: pictures that show both characters, by variant.
        merged_equal: pictures of the merged file with the bytes of the single one's.
        control_equal: pictures without a trigger with the bytes of the base model's.
        states_equal: text states without a trigger with the bytes of the base model's.
    """

    identity: dict[tuple[str, bool], Tally] = field(default_factory=dict)
    scene: dict[tuple[str, bool], Tally] = field(default_factory=dict)
    pair: dict[str, Tally] = field(default_factory=dict)
    merged_equal: Tally = field(default_factory=Tally)
    control_equal: Tally = field(default_factory=Tally)
    states_equal: Tally = field(default_factory=Tally)


def list_failures(measures: Measures) -> tuple[str, ...]:
    """Return the exact promises that did not hold; the shares are figures, not promises."""
    return list_broken(
        {
            "pictures without a trigger differ from the base model's": measures.control_equal,
            "text states without a trigger differ from the base model's": measures.states_equal,
            "pictures of the merged file differ from those of the single one": measures.merged_equal,
        }
    )


def list_broken(promises: Mapping[str, Tally]) -> tuple[str, ...]:
    """Return a sentence for each promise that did not hold every time.

    Args:
        promises: what it means that one does not hold, and how often it was right.
    """
    return tuple(
        f"{tally.count - tally.right} of {tally.count} {text}"
        for text, tally in promises.items()
        if tally.right != tally.count
    )


def list_figures(
    measures: Measures, reports: Mapping[str, TrainReport], merged: Adapter, seconds: float
) -> tuple[Figure, ...]:
    """Return the figures of the page, the ones with a bar first."""
    engram, base = measures.identity["engram", True], measures.identity["base", True]
    scene, base_scene = measures.scene["engram", True], measures.scene["base", True]
    return (
        Figure(
            label="Identity in new scenes",
            value=str(engram),
            bar=f"at least {_IDENTITY_BAR:.2f}",
            met=engram.share >= _IDENTITY_BAR,
            explanation="Pictures in which the judge finds the character, every attribute right.",
        ),
        base_figure(base),
        Figure(
            label="Scene obeyed",
            value=f"{scene.share:.2f} (base {base_scene.share:.2f})",
            bar=f"within {_SCENE_BAR:.2f} of the base",
            met=abs(scene.share - base_scene.share) <= _SCENE_BAR,
            explanation="Pictures in which the judge finds the scene that the prompt asks for.",
        ),
        *exact_figures("pictures", measures.control_equal, measures.states_equal, measures.merged_equal),
        Figure(
            label="Both in one prompt",
            value=f"{measures.pair['merged']}, described {measures.pair['base, described'].share:.2f}",
            explanation="Pictures in which the judge finds both, each in its place. Described: without engrams, all "
            "their looks spelled out in words the model knows.",
        ),
        Figure(
            label="Identity in the scenes shown",
            value=str(measures.identity["engram", False]),
            explanation="The scenes of the reference pictures, drawn anew.",
        ),
        *cost_figures("pictures", reports, merged, seconds, "Training, merging, drawing and measuring."),
    )


def base_figure(base: Tally) -> Figure:
    """Return how often the base model drew a character of which it knows nothing."""
    return Figure(
        label="The same without the engram",
        value=str(base),
        bar=f"at most {_BASE_BAR:.2f}",
        met=base.share <= _BASE_BAR,
        explanation="The base model does not know the name and draws some subject or other.",
    )


def exact_figures(noun: str, control: Tally, states: Tally, same: Tally) -> tuple[Figure, ...]:
    """Return what has to be identical.

    Args:
        noun: what is drawn, in the plural.
        control: what was drawn without a trigger, with the bytes of the base model's.
        states: text states without a trigger, likewise.
        same: what the merged file drew, with the bytes of the single one's.
    """
    return (
        Figure(
            label="Nothing else changes",
            value=f"{control.right} of {control.count}, states {states.right} of {states.count}",
            bar="all identical",
            met=control.right == control.count and states.right == states.count,
            explanation=f"{noun.capitalize()} and text states of prompts without a full name, with the merged file "
            "loaded, against the base model's.",
        ),
        Figure(
            label="Merging changes nothing",
            value=f"{same.right} of {same.count} {noun}",
            bar="all identical",
            met=same.right == same.count,
            explanation=f"One name in the prompt: {noun} of the merged file against those of the character's own.",
        ),
    )


def cost_figures(
    noun: str, reports: Mapping[str, TrainReport], merged: Adapter, seconds: float, work: str
) -> tuple[Figure, ...]:
    """Return what it took.

    Args:
        noun: what was learned from, in the plural.
        reports: how it was learned, by character.
        merged: the file of all characters.
        seconds: in all.
        work: what these were spent on, as a sentence.
    """
    return (
        Figure(
            label="Training",
            value=", ".join(f"{report.seconds:.0f} s" for report in reports.values()),
            explanation=f"One character after the other, {noun} to file.",
        ),
        Figure(
            label="Size of the merged file",
            value=f"{merged.nbytes() / 1000:.1f} kB",
            explanation="Both characters: vectors, scales and addresses.",
        ),
        Figure(label="In all", value=f"{seconds:.0f} s", explanation=work),
    )
