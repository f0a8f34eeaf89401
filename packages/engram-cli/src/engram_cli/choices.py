"""What the user chose for a command: with flags, with --set, in a file and, asked for in a terminal, by answers."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from engram_cli.backends import find_backbone, list_able, none_able
from engram_cli.concept_lists import OWN_SETTINGS, read_concepts
from engram_cli.endings import UsageError
from engram_cli.options import NOT_SETTINGS
from engram_cli.settings_files import parse_value, read_settings
from engram_core import EngramError, InputError, MissingSettingsError
from engram_core.settings import Layer, resolve_settings

_ABILITIES = {"eval": "evaluate"}  # where a backbone's attributes have another name than the command


class Choices:
    """The choices for one call of a command; what is missing is asked for, or told in one usage error."""

    def __init__(self, ctx: typer.Context, arguments: Mapping[str, Any]) -> None:
        """Read the file as well.

        Args:
            ctx: of the command.
            arguments: its parameters and their values, those of `NOT_SETTINGS` among them.

        Raises:
            UsageError: the file or an assignment is wrong.
        """
        self._command, self._path = str(ctx.info_name), ctx.command_path.split()[1:]
        self._parameters = {str(parameter.name): parameter for parameter in ctx.command.params}
        self._arguments = arguments
        self._flags = {
            name: value
            for name, value in arguments.items()
            if name not in NOT_SETTINGS and value is not None and value != []
        }
        self._assigned = self._read_assignments(arguments.get("assignments") or [])
        with _wrong_usage():
            self._file = read_settings(arguments.get("config"), self._command)
        self._answers: dict[str, str] = {}

    def texts(self, name: str) -> list[str]:
        """Return the texts chosen for a setting before a backbone is known; what is no text is told later."""
        if name in self._flags:
            chosen = self._flags[name]
        elif name in self._assigned:
            chosen = _parse_text(self._assigned[name])
        else:
            chosen = self._file.values.get(name)
        return [text for text in (chosen if isinstance(chosen, list) else [chosen]) if isinstance(text, str)]

    def backbone_name(self) -> str | None:
        """Return the backbone chosen for this command."""
        return self._arguments.get("backbone") or self._file.backbone

    def backbone(self, suggestion: str | None = None) -> Any:
        """Return the chosen backbone; asks when there is none.

        Args:
            suggestion: taken when none was chosen for this command.

        Raises:
            UsageError: none was chosen, and there is nobody to ask.
            EngramError: it is not installed or lacks the ability.
        """
        name = self.backbone_name() or suggestion or self._file.common_backbone
        if name is None:
            able = list_able(self._command)
            if not able:
                raise none_able(self._command)
            if not _someone_is_there():
                raise UsageError(str(MissingSettingsError(["backbone", *self._missing(list(able.values()))])))
            name = self._answers["backbone"] = self._ask("backbone", f"one of {', '.join(able)}")
        return find_backbone(name, self._command)

    def settings(self, backbone: Any, suggestions: Sequence[Layer] = ()) -> Any:
        """Return the settings of a backbone for this command; asks for those that are missing.

        Args:
            backbone: one with the command's ability.
            suggestions: settings that are stronger than defaults and weaker than choices.

        Raises:
            UsageError: settings are unknown, wrong, or missing and there is nobody to ask.
        """
        kind = _settings_class(backbone, self._command)
        layers = self._layers(backbone, suggestions)
        with _wrong_usage():
            try:
                return resolve_settings(kind, layers)
            except MissingSettingsError as error:
                if not _someone_is_there():
                    raise
                missing = error.names
            answers = {name: self._ask(name) for name in missing}
            self._answers.update(answers)
            return resolve_settings(kind, [*layers, Layer(source="your answer", values=_parse(kind, answers))])

    def concept_settings(self, backbone: Any, path: Path) -> list[Any]:
        """Return the settings of each concept of a list; its own are stronger than those of files, for all.

        Args:
            backbone: one that trains.
            path: the list.

        Raises:
            UsageError: the list or settings are wrong.
        """
        kind = _settings_class(backbone, self._command)
        with _wrong_usage():
            for name in (name for name in OWN_SETTINGS if name in self._flags or name in self._assigned):
                raise InputError(f"{name} is a concept's own; write it in {path}, or train one without --concepts")
            folder = self._flags.get("output") or next(iter(self.texts("output")), None)
            if folder is None:
                raise InputError("missing: --output, the folder for the adapters")
            *weaker, assigned, flags = self._layers(backbone)
            stronger = [replace(each, values={**each.values, "output": None}) for each in (assigned, flags)]
            return [
                resolve_settings(kind, [*weaker, concept, *stronger]) for concept in read_concepts(path, Path(folder))
            ]

    def command_line(self, **changes: bool) -> str:
        """Return a command that makes the same choices again, answers included.

        Args:
            changes: switches to turn on or off.
        """
        words = ["engram", *self._path]
        for name, value in {**self._arguments, **self._answers, **changes}.items():
            if name in self._parameters:
                parameter = self._parameters[name]
                words += _option_words(parameter, value) if value != parameter.default else []
            elif name in self._answers:
                words += ["--set", f"{name}={value}"]
        return shlex.join(words)

    def _read_assignments(self, assignments: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for text in assignments:
            name, mark, value = text.partition("=")
            if not mark or not name:
                raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
            if name in found or name in self._flags:
                raise typer.BadParameter(f"{name} is given twice", param_hint="--set")
            found[name] = value
        return found

    def _layers(self, backbone: Any, suggestions: Sequence[Layer] = ()) -> list[Layer]:
        kind = _settings_class(backbone, self._command)
        suggested = [layer.values.get("model") for layer in reversed(suggestions)]
        defaults = [field.default for field in fields(kind) if field.name == "model"]
        models = [*self.texts("model"), *suggested, *defaults, backbone.default_model]
        model = next(text for text in models if isinstance(text, str))
        ability = _ABILITIES.get(self._command, self._command)
        advice = getattr(backbone, f"default_{ability}_settings")(model)
        return [
            Layer(source=f"backbone {backbone.name}", values=advice),
            *suggestions,
            Layer(source=self._file.source, values=self._file.values),
            Layer(source="--set", values=_parse(kind, self._assigned)),
            Layer(source="command line", values=self._flags),
        ]

    def _missing(self, backbones: Sequence[Any]) -> list[str]:
        """Return the settings that are missing whichever of some backbones is chosen."""
        missing = []
        for backbone in backbones:
            names: tuple[str, ...] = ()
            try:
                resolve_settings(_settings_class(backbone, self._command), self._layers(backbone))
            except MissingSettingsError as error:
                names = error.names
            except EngramError:  # told once the backbone is known
                pass
            missing.append(names)
        return [name for name in missing[0] if all(name in names for names in missing)]

    def _ask(self, name: str, hint: str | None = None) -> str:
        about = hint or getattr(self._parameters.get(name), "help", None)
        label = name.replace("_", " ") + (f" ({about.rstrip('.')})" if about else "")
        try:
            answer: str = typer.prompt(label, err=True)
        except typer.Abort:
            typer.echo(err=True)  # leaves the line of the question
            raise KeyboardInterrupt from None
        return answer


@contextlib.contextmanager
def _wrong_usage() -> Iterator[None]:
    """Report what is wrong with choices as wrong usage."""
    try:
        yield
    except InputError as error:
        raise UsageError(str(error)) from error


def _someone_is_there() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _settings_class(backbone: Any, command: str) -> type[Any]:
    kind: type[Any] = getattr(backbone, f"{_ABILITIES.get(command, command)}_settings")
    return kind


def _parse(kind: type[Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Return values as TOML reads them; where a text or a path is wanted, a bare text is taken as it stands."""
    hints = get_type_hints(kind)
    values = {}
    for name, text in texts.items():
        hint = hints.get(name)
        wants_text = {hint, *get_args(hint)} & {str, Path}
        values[name] = _parse_text(text) if wants_text else parse_value(text)
    return values


def _parse_text(text: str) -> str | list[Any]:
    value = parse_value(text)
    return value if isinstance(value, str | list) else text


def _option_words(parameter: Any, value: Any) -> list[str]:
    """Return the words that give a value to an option; none where there is no value."""
    name = max(parameter.opts, key=len)
    if value is True:
        return [name]
    if value is False:
        return [*parameter.secondary_opts]
    if value is None:
        return []
    return [word for item in (value if isinstance(value, list) else [value]) for word in (name, str(item))]
