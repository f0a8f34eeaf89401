"""`engram doctor`: what is installed, what works, and what does not."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: engram doctor --json > report.json")(doctor)


PACKAGES = ("engram-core", "engram-cli", "engram-vision", "engram-video", "engram-llm")
LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers", "diffusers", "accelerate")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for scripts.")] = False,
) -> None:
    """Check the installation: packages, backbones, devices, disk. Exit status 1 when something is broken."""
    from engram_cli.console import working
    from engram_cli.messages import format_size, show, show_columns, show_json

    with working("checking"):
        report = examine()
    if as_json:
        show_json(report)
    else:
        marks = {"ok": "ok", "absent": "-", "broken": "!!"}
        show_columns(
            ("", "what", "state"), [(marks[row["status"]], row["what"], row["state"]) for row in report["checks"]]
        )
        show(f"free disk here: {format_size(report['free_bytes'])}")
    if any(row["status"] == "broken" for row in report["checks"]):
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Return the report as plain values."""
    import platform
    import shutil
    import sys
    from importlib.metadata import PackageNotFoundError, version

    from engram_core import EngramError, list_backbones

    checks: list[dict[str, str]] = []

    def add(status: str, what: str, state: str) -> None:
        checks.append({"status": status, "what": what, "state": state})

    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    add("ok" if supported else "broken", "Python", f"{platform.python_version()} on {platform.platform()}")
    for package in (*PACKAGES, *LIBRARIES):
        try:
            add("ok", package, version(package))
        except PackageNotFoundError:
            add("absent", package, "not installed")
    for name, problem in _foreign_packages():
        add("broken", name, problem)
    for name, installed in list_backbones().items():
        try:
            backbone = installed.load()
        except EngramError as error:
            add("broken", f"backbone {name}", str(error))
        else:
            streams = ", ".join(f"{stream} ({site})" for stream, site in backbone.streams.items())
            add("ok", f"backbone {name}", f"{backbone.title}: {streams}; from {installed.package}")
    add(*_devices())
    return {"checks": checks, "free_bytes": shutil.disk_usage(".").free}


def _foreign_packages() -> list[tuple[str, str]]:
    """Return distributions of other projects that hide ours: the public names are not this project's."""
    from importlib.metadata import distributions

    found = []
    ours = {"engram_core": "engram-core", "engram_cli": "engram-cli"}
    for distribution in distributions():
        record = distribution.read_text("RECORD") or ""
        modules = {line.split("/")[0] for line in record.splitlines() if "/" in line}
        found += [
            (distribution.name, f"also installs {module!r}; it is another project's, uninstall it")
            for module in sorted(modules & ours.keys())
            if distribution.name.replace("_", "-") != ours[module]
        ]
    return found


def _devices() -> tuple[str, str, str]:
    try:
        import torch
    except ImportError:
        return "absent", "devices", "torch is not installed"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return "ok", "devices", f"CUDA {torch.version.cuda}: {names}"
    if torch.backends.mps.is_available():
        return "ok", "devices", "Apple GPU (mps)"
    return "ok", "devices", "CPU only"
