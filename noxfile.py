"""The workspace's checks, one session each: `uv run nox -l` lists them, `uv run nox -s lint` runs one."""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "docs", "tests", "wheels"]

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PACKAGES = ["engram-core", "engram-vision", "engram-video", "engram-llm", "engram-cli"]
CORE_ALONE = {"engram-core", "numpy", "safetensors"}
LIST_INSTALLED = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"


def sync(session: nox.Session, *options: str) -> None:
    """Install what uv.lock says into the session's own environment."""
    location = session.virtualenv.location
    session.run_install(
        "uv",
        "sync",
        "--locked",
        f"--python={location}",
        *options,
        env={"UV_PROJECT_ENVIRONMENT": location},
    )


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the quick tests of every package on each supported Python."""
    sync(session, "--no-default-groups", "--group=test")
    session.run("pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take more than a few seconds."""
    sync(session, "--no-default-groups", "--group=test", "--group=workers")
    session.run("pytest", "-m", "slow and not gpu and not network", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and formatting with Ruff."""
    sync(session, "--only-group=lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, strictly."""
    sync(session)
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning fails."""
    sync(session, "--only-group=docs")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session(reuse_venv=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def wheels(session: nox.Session, package: str) -> None:
    """Install one package's wheel alone in an empty environment and run its tests there."""
    for name in PACKAGES:
        session.run_install("uv", "build", "--quiet", "--package", name, "--wheel", "-o", str(DIST))
    # The names on the public index belong to other projects, so each of ours is tied to the wheel built here.
    wheel = {name: next(DIST.glob(f"{name.replace('-', '_')}-*.whl")) for name in PACKAGES}
    work = Path(session.create_tmp()).resolve()
    pins = work / "constraints.txt"
    export = ["uv", "export", "--quiet", "--locked", "--all-packages", "--no-emit-workspace", "--no-hashes"]
    session.run_install(*export, "--output-file", str(pins))
    with pins.open("a", encoding="utf-8") as file:
        file.writelines(f"{name} @ {path.as_uri()}\n" for name, path in wheel.items())
    session.install("--constraints", str(pins), str(wheel[package]))
    if package == "engram-core":
        installed = set(str(session.run("python", "-c", LIST_INSTALLED, silent=True)).split())
        if installed != CORE_ALONE:
            session.error(f"engram-core alone installs {sorted(installed)}, expected {sorted(CORE_ALONE)}")
    session.run("python", "-c", f"import {package.replace('-', '_')}")

    # A copy, so that nothing of the source tree can be imported.
    copy = work / "tests"
    shutil.rmtree(copy, ignore_errors=True)
    source = ROOT / "packages" / package / "tests"
    if not any(source.rglob("test_*.py")):
        session.skip(f"{package} has no tests yet")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    session.install("--constraints", str(pins), "pytest", "hypothesis")
    with session.chdir(work):
        session.run("pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(work), str(copy))


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measure engram-core, or the package named first, as in `-- vision`; further arguments go to the script."""
    named = session.posargs[:1] and session.posargs[0] in ("core", "vision", "video", "llm")
    package, *arguments = session.posargs if named else ["core", *session.posargs]
    sync(session, "--no-default-groups", "--group=test", "--group=comparisons")
    session.run("python", f"packages/engram-{package}/benchmarks/run.py", *arguments)


@nox.session
def results(session: nox.Session) -> None:
    """Fill the page of results with what the benchmarks kept."""
    sync(session, "--only-group=results")
    session.run("python", "-m", "recipes.results", *session.posargs)


@nox.session
def tiny(session: nox.Session) -> None:
    """Make the tiny checkpoint and its judge anew, in about an hour and a half; goes on where it was stopped."""
    sync(session, "--no-default-groups")
    session.run("python", "-m", "recipes.small_world", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feed damaged adapter files to the reader; arguments after `--` go to the script."""
    sync(session, "--no-default-groups", "--group=test")
    session.run("python", "packages/engram-core/fuzz/run.py", *session.posargs)
