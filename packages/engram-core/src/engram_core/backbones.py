"""The backbones installed packages offer, found through entry points and loaded only when used."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from engram_core.adapter import Adapter
from engram_core.concept import Rule
from engram_core.errors import BackboneLoadError, BackboneNotFoundError
from engram_core.memory import HashedMemory
from engram_core.reports import EvaluateReport, TextReport
from engram_core.tokenizer import StreamTokenizer

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "engram.backbones"


@runtime_checkable
class Backbone(Protocol):
    """What a package offers for one model family.

    Register an object with these attributes under the entry-point group `engram.backbones`, in the name
    users pass to `--backbone`. Further abilities are further methods; see `docs/third-party.md`.

    Attributes:
        name: the name of the entry point.
        kind: `concept-table` or `hashed-memory`.
        title: the model family in words.
        streams: stream name to the site whose states are edited, e.g. `{"clip_l": "last_hidden_state"}`.
        default_model: hub id used when no model is named.
    """

    name: str
    kind: str
    title: str
    streams: Mapping[str, str]
    default_model: str

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> Mapping[str, StreamTokenizer]:
        """Return the tokenizers of a model (hub id or local folder) by stream; loads no weights.

        Args:
            model: hub id or local folder.
            streams: load only these; None means all.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertSettings:
    """What a user can say about a foreign checkpoint; None where the checkpoint should know.

    Attributes:
        model: hub id or folder of the base model, for its tokenizers.
        name: name of the concept or memory.
        trigger: the phrase a concept was trained with.
        max_ngram: N, of a concept's registration or of a hashed memory.
        rule: how a concept's vectors become residuals.
        license: licence of a hashed memory.
        pad_id: token id that stands left of the text for a hashed memory.
        hash_seed: seed of a hashed memory's hash.
    """

    model: str | None = None
    name: str | None = None
    trigger: str | None = None
    max_ngram: int | None = None
    rule: Rule | None = None
    license: str | None = None
    pad_id: int | None = None
    hash_seed: int | None = None


@runtime_checkable
class ConvertingBackbone(Backbone, Protocol):
    """A backbone that can import checkpoints of other tools."""

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter | HashedMemory:
        """Return a foreign checkpoint as an adapter.

        Args:
            source: a file or folder.
            settings: what the user said about it.

        Raises:
            EngramError: the checkpoint cannot be read or does not fit.
        """
        ...


class Watcher:
    """Hears how long work goes on; this one ignores everything, and one that shows it overrides what it needs.

    A piece of work is announced with `begin`, reports with `advance`, and ends when the next begins or with `end`.
    """

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Begin a piece of work of `total` units, of which `done` are done; None when that is not known."""

    def advance(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        """Tell that `done` units are done, with figures worth showing, e.g. `{"loss": 0.12}`."""

    def end(self) -> None:
        """End the present piece of work."""

    def note(self, message: str) -> None:
        """Tell what the user should know but did not ask for; one line."""

    def text(self, title: str, piece: str) -> None:
        """Hear the next piece of the text `title` while it is generated; an empty piece ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a training run made.

    Attributes:
        output: the adapter file.
        run_dir: folder with the resolved settings, the metrics, the previews and the state to go on from.
        identity: hex SHA-256 of the adapter file.
        n_bytes: size of the adapter file.
        steps: steps done in all.
        kept_step: the step whose vectors are in the file.
        loss: validation loss at that step, or the mean training loss at the end where nothing was validated.
        seconds: time this call took.
        entries: entries in each stream; of a language model's memory, rows before each layer.
        contents: what the file holds, in words; empty where that is the entries.
    """

    output: Path
    run_dir: Path
    identity: str
    n_bytes: int
    steps: int
    kept_step: int
    loss: float
    seconds: float
    entries: Mapping[str, int]
    contents: str = ""


@runtime_checkable
class TrainingBackbone(Backbone, Protocol):
    """A backbone that can train a concept.

    Attributes:
        train_settings: the settings class, see `engram_core.settings`. Importing the backbone, and with it
            this class, must not import torch.
    """

    train_settings: type[Any]

    def default_train_settings(self, model: str) -> Mapping[str, Any]:
        """Return settings that suit a model better than the class's own defaults; usually none."""
        ...

    def train(
        self, settings: Any, *, resume: bool = False, overwrite: bool = False, watcher: Watcher | None = None
    ) -> TrainReport:
        """Train a concept and write its adapter.

        Args:
            settings: an instance of `train_settings`.
            resume: go on with an interrupted run.
            overwrite: replace the adapter file, and begin anew in a run folder that is in use.
            watcher: hears how it goes.

        Raises:
            EngramError: anything the user can mend.
            KeyboardInterrupt: after the state was saved, so that `resume` goes on.
        """
        ...


@runtime_checkable
class ConceptsTrainingBackbone(TrainingBackbone, Protocol):
    """A backbone that can train several concepts at once: one pass through the frozen model serves them all."""

    def check_concepts(self, settings: Sequence[Any], *, resume: bool = False, overwrite: bool = False) -> None:
        """Refuse early what `train_together` would, for any number of concepts; loads nothing.

        Args:
            settings: an instance of `train_settings` for each concept.
            resume: as for `train_together`.
            overwrite: as for `train_together`.

        Raises:
            EngramError: they cannot learn together, or would overwrite something.
        """
        ...

    def train_together(
        self,
        settings: Sequence[Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        watcher: Watcher | None = None,
    ) -> list[TrainReport]:
        """Train concepts at once, each as if it were alone, and write an adapter for each.

        Args:
            settings: an instance of `train_settings` for each concept, with an attribute `output`.
            resume: go on with interrupted runs, each from where it stopped.
            overwrite: as for `train`.
            watcher: hears how it goes.

        Raises:
            EngramError, KeyboardInterrupt: as for `train`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One file that generation wrote.

    Attributes:
        path: the file.
        prompt: what was asked for.
        seed: of the noise.
        identity: hex SHA-256 over the adapters in use; None for the base model's.
    """

    path: Path
    prompt: str
    seed: int
    identity: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReport:
    """What generation wrote.

    Attributes:
        files: one for each prompt and seed (with `compare` two: base and engram).
        grid: picture that shows all of them side by side, when asked for.
        seconds: time it took.
    """

    files: tuple[Generated, ...]
    grid: Path | None
    seconds: float


@runtime_checkable
class GeneratingBackbone(Backbone, Protocol):
    """A backbone that can generate with adapters.

    Attributes:
        generate_settings: the settings class; as with `train_settings` without torch.
    """

    generate_settings: type[Any]

    def default_generate_settings(self, model: str) -> Mapping[str, Any]:
        """Return settings that suit a model better than the class's own defaults; usually none."""
        ...

    def generate(
        self, settings: Any, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> GenerateReport | TextReport:
        """Generate files, or texts.

        Args:
            settings: an instance of `generate_settings`.
            overwrite: replace files of the same names.
            watcher: hears how it goes, and notes about triggers that do not fire.

        Raises:
            EngramError: anything the user can mend.
        """
        ...


@runtime_checkable
class EvaluatingBackbone(Backbone, Protocol):
    """A backbone that can measure what adapters change.

    Attributes:
        evaluate_settings: the settings class; as with `train_settings` without torch.
    """

    evaluate_settings: type[Any]

    def default_evaluate_settings(self, model: str) -> Mapping[str, Any]:
        """Return settings that suit a model better than the class's own defaults; usually none."""
        ...

    def evaluate(self, settings: Any, *, overwrite: bool = False, watcher: Watcher | None = None) -> EvaluateReport:
        """Measure the base model, and the model with adapters.

        Args:
            settings: an instance of `evaluate_settings`.
            overwrite: replace a file of the same name.
            watcher: hears how it goes.

        Raises:
            EngramError: anything the user can mend.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipsReport:
    """What making clips of pictures wrote.

    Attributes:
        folder: the clip set, ready for training.
        clips: its clips, in the order of the pictures.
        n_made: how many of them were made now; the others were there already.
        sheet: picture that shows them all.
        seconds: time it took.
    """

    folder: Path
    clips: tuple[Path, ...]
    n_made: int
    sheet: Path
    seconds: float


@runtime_checkable
class ClipMakingBackbone(Backbone, Protocol):
    """A backbone that can make clips of pictures, to train on.

    Attributes:
        clips_settings: the settings class; as with `train_settings` without torch.
    """

    clips_settings: type[Any]

    def default_clips_settings(self, model: str) -> Mapping[str, Any]:
        """Return settings that suit a model better than the class's own defaults; usually none."""
        ...

    def build_clips(self, settings: Any, *, overwrite: bool = False, watcher: Watcher | None = None) -> ClipsReport:
        """Make a clip of each picture; clips that are there already are kept.

        Args:
            settings: an instance of `clips_settings`.
            overwrite: make anew what was made otherwise.
            watcher: hears how it goes.

        Raises:
            EngramError: anything the user can mend.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What a demonstration showed.

    Attributes:
        page: one self-contained HTML page.
        figures: title to value, ready to print, in order.
        passed: whether every promise held; the first is that without a trigger the output is byte-identical.
        failures: what did not hold, one sentence each.
        seconds: time it took.
    """

    page: Path
    figures: Mapping[str, str]
    passed: bool
    failures: tuple[str, ...]
    seconds: float


@runtime_checkable
class DemonstratingBackbone(Backbone, Protocol):
    """A backbone with a demonstration that needs nothing but the installed packages."""

    def demo(
        self, output: Path, *, seed: int = 0, overwrite: bool = False, watcher: Watcher | None = None
    ) -> DemoReport:
        """Train, merge and generate with the checkpoint that ships, and measure.

        Args:
            output: folder for the page, the adapters and the pictures.
            seed: of everything random.
            overwrite: replace what an earlier demonstration wrote there.
            watcher: hears how it goes.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledBackbone:
    """A backbone that some installed package registers; not loaded yet."""

    name: str
    package: str
    version: str
    entry_point: EntryPoint

    def load(self) -> Backbone:
        """Import the backbone.

        Raises:
            BackboneLoadError: the import fails or the object is not a backbone.
        """
        where = f"backbone {self.name!r} of {self.package} {self.version} ({self.entry_point.value})"
        try:
            backbone = self.entry_point.load()
        except Exception as error:  # a third party's import can raise anything
            raise BackboneLoadError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
        if not isinstance(backbone, Backbone):
            raise BackboneLoadError(
                f"{where}: is not a backbone; it needs name, kind, title, streams, default_model and load_tokenizers"
            )
        if backbone.name != self.name:
            raise BackboneLoadError(f"{where}: calls itself {backbone.name!r}; both names must agree")
        return backbone


def list_backbones() -> dict[str, InstalledBackbone]:
    """Return the backbones of all installed packages, by name in order; imports none of them."""
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    found = {}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        dist = entry.dist
        found[entry.name] = InstalledBackbone(
            name=entry.name,
            package=dist.name if dist else "unknown package",
            version=dist.version if dist else "",
            entry_point=entry,
        )
    return found


def load_backbone(name: str) -> Backbone:
    """Import one backbone by name.

    Raises:
        BackboneNotFoundError: no installed package registers the name; suggests the nearest.
        BackboneLoadError: its package cannot be imported.
    """
    installed = list_backbones()
    if name not in installed:
        near = difflib.get_close_matches(name, installed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(installed) or "none"
        raise BackboneNotFoundError(f"backbone {name!r} is not installed; {hint}installed: {known}")
    return installed[name].load()
