"""Merging: thousands of one-concept adapters into one, beside a loop that only copies bytes.

Run through `run.py`. Each measurement is a fresh process; this file is its program, too.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

WIDTH = 768
MIB = 1 << 20


def run(*, quick: bool) -> Any:
    """Measure everything."""
    from measure import Bound, Outcome, Table

    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    bounds: list[Bound] = []
    count, others = (500, 200) if quick else (10_000, 2_000)
    for label, n_files, same_shape in (
        ("of 7 tokens", count, True),
        ("of 7 tokens", others, True),
        ("of 4 to 10", others, False),
    ):
        samples = _measure(n_files, same_shape=same_shape, repeats=3 if quick else 5)
        ours, plain = samples["merge_files"], samples["plain loop"]
        ratio = _median(ours, "wall_s") / _median(plain, "wall_s")
        peak = max(sample["peak_bytes"] for sample in ours) / MIB
        rows.append((label, f"{n_files:,}", "plain loop", *_cells(plain), ""))
        rows.append((label, f"{n_files:,}", "merge_files", *_cells(ours), f"{ratio:.1f} times"))
        figures[f"triggers {label}, {n_files} files"] = samples
        if n_files == count:
            bounds = [
                Bound(what=f"merge_files against the plain loop, {count:,} files", value=ratio, limit=5),
                Bound(what=f"peak memory of merge_files, {count:,} files", value=peak, limit=500, unit="MiB"),
            ]
    table = Table(
        title="One process for each, median (least to most)",
        columns=("triggers", "files", "what", "time", "peak memory", "of it anonymous", "dearer"),
        rows=rows,
    )
    return Outcome(tables=[table], bounds=bounds, figures=figures)


def _measure(n_files: int, *, same_shape: bool, repeats: int) -> dict[str, Any]:
    """Return the samples of both ways, measured in turn over the same files."""
    from synthetic import write_adapters

    samples: dict[str, Any] = {"merge_files": [], "plain loop": []}
    with tempfile.TemporaryDirectory(prefix="engram-merging-") as name:
        folder = Path(name)
        (first,) = write_adapters(folder, 1, WIDTH)
        size = first.stat().st_size * n_files
        free = shutil.disk_usage(folder).free
        if free < 3 * size:
            raise OSError(f"{folder}: needs {3 * size / MIB:,.0f} MiB, has {free / MIB:,.0f} MiB; set TMPDIR")
        sources = folder / "sources"
        sources.mkdir()
        print(f"writing {n_files:,} adapters, {size / MIB:,.0f} MiB ...", file=sys.stderr, flush=True)
        write_adapters(sources, n_files, WIDTH, same_shape=same_shape)
        os.sync()
        for number in range(repeats + 1):
            for what, found in samples.items():
                sample = _run_child(what, sources, folder / "target")
                if number:  # the first round warms the page cache
                    found.append(sample)
    return samples


def _run_child(what: str, sources: Path, target: Path) -> dict[str, float]:
    """Run one way in a fresh process; look at its anonymous memory from outside meanwhile."""
    command = [sys.executable, __file__, what, str(sources), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        anonymous = 0
        while child.poll() is None:
            anonymous = max(anonymous, _read_anonymous(child.pid))
            sleep(0.01)
        output = child.stdout.read() if child.stdout else ""
    if child.returncode:
        raise RuntimeError(f"{what} failed with status {child.returncode}")
    target.unlink()  # outside the timing: freeing gigabytes of cache takes a while
    return json.loads(output) | {"anonymous_bytes": anonymous}


def _read_anonymous(pid: int) -> int:
    return _read_status(str(pid), "RssAnon")


def _read_peak() -> int:
    """Return the most memory this process has held, pages of mapped files included."""
    # Where there is /proc: what getrusage tells starts from the size of the process that started this one.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _read_status("self", "VmHWM") or most


def _read_status(process: str, field: str) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:  # it has just ended, or this system has no /proc
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields.get(field, "0 kB").split()[0]) * 1024


def _cells(samples: list[dict[str, float]]) -> tuple[str, str, str]:
    times = sorted(sample["wall_s"] for sample in samples)
    return (
        f"{_median(samples, 'wall_s'):.2f} s ({times[0]:.2f} to {times[-1]:.2f})",
        f"{max(sample['peak_bytes'] for sample in samples) / MIB:,.0f} MiB",
        f"{max(sample['anonymous_bytes'] for sample in samples) / MIB:,.0f} MiB",
    )


def _median(samples: list[dict[str, float]], field: str) -> float:
    return sorted(sample[field] for sample in samples)[len(samples) // 2]


def merge(paths: list[Path], target: Path) -> None:
    """Merge; forces the result to disk before it gets its name."""
    from engram_core import merge_files

    merge_files(paths, target)


def copy(paths: list[Path], target: Path) -> None:
    """Write the bytes of every file to one file, and force it to disk as `merge_files` does."""
    with target.open("wb") as stream:
        for path in paths:
            stream.write(path.read_bytes())
        stream.flush()
        os.fsync(stream.fileno())


def _main(what: str, sources: str, target: str) -> None:
    if what == "merge_files":
        import engram_core  # noqa: F401 - starting up is not what is measured here
    paths = sorted(Path(sources).iterdir())
    start = perf_counter()
    (merge if what == "merge_files" else copy)(paths, Path(target))
    wall = perf_counter() - start
    print(json.dumps({"wall_s": wall, "peak_bytes": _read_peak()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
