"""Opening: time and bytes read to open an adapter and read one concept by name, by the number of concepts.

Run through `run.py`. Each measurement is a fresh process; this file is its program, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

SIZES = [1, 100, 10_000, 100_000]
WIDTH = 64  # with 768 channels the largest file would have 19 GB
STREAMS = ("clip_g", "clip_l", "t5")
KIB, MIB = 1 << 10, 1 << 20

Sample = dict[str, float]


def run(*, quick: bool) -> Any:
    """Measure everything."""
    from measure import Outcome, Spread, Table
    from synthetic import concept_name, write_table

    sizes = SIZES[:3] if quick else SIZES
    warm: dict[int, list[Sample]] = {size: [] for size in sizes}
    cold: dict[int, list[Sample]] = {size: [] for size in sizes}
    notes = []
    with tempfile.TemporaryDirectory(prefix="engram-opening-") as name:
        paths = {size: Path(name) / f"{size}.safetensors" for size in sizes}
        for size, path in paths.items():
            with path.open("wb", buffering=0) as target:
                write_table(target, size, dict.fromkeys(STREAMS, WIDTH))
                os.fsync(target.fileno())
        for _ in range(3 if quick else 15):
            for size, path in paths.items():
                _forget(path)
                sample = _run_child(path, concept_name(size // 2))
                cold[size].append(sample | {"resident_bytes": _resident(path)})
                warm[size].append(_run_child(path, concept_name(size // 2)))
        ahead = _read_ahead(Path(name))
        bytes_of = {size: path.stat().st_size for size, path in paths.items()}
    if not any(sample["disk_bytes"] for samples in cold.values() for sample in samples):
        notes.append("this file system does not count reads; the bytes in memory tell what was read.")
    if ahead is not None:
        notes.append(f"the system reads up to {ahead:,} KiB ahead on this disk, so reading a byte reads that much.")

    rows = []
    figures: dict[str, Any] = {}
    for size in sizes:
        opened = Spread.of([sample["open_s"] for sample in warm[size]])
        read = Spread.of([sample["concept_s"] for sample in warm[size]])
        first = Spread.of([sample["open_s"] + sample["concept_s"] for sample in cold[size]])
        disk = _median(cold[size], "disk_bytes")
        resident = _median(cold[size], "resident_bytes")
        rows.append(
            (
                f"{size:,}",
                f"{bytes_of[size] / MIB:,.1f} MiB",
                opened.show("ms"),
                read.show("ms"),
                first.show("ms"),
                f"{disk / KIB:,.0f} KiB",
                f"{resident / KIB:,.0f} KiB",
            )
        )
        figures[f"{size} concepts"] = {
            "file_bytes": bytes_of[size],
            "open_s": opened.median,
            "concept_s": read.median,
            "cold_s": first.median,
            "disk_bytes": disk,
            "resident_bytes": resident,
        }
    table = Table(
        title="Median (10th to 90th percentile)",
        columns=(
            "concepts",
            "file",
            "open_adapter",
            "concept(name)",
            "both, nothing cached",
            "read from disk",
            "of the file in memory after",
        ),
        rows=rows,
    )
    return Outcome(tables=[table], notes=notes, figures=figures)


def _median(samples: list[Sample], field: str) -> float:
    return sorted(sample[field] for sample in samples)[len(samples) // 2]


def _run_child(path: Path, name: str) -> Sample:
    command = [sys.executable, __file__, str(path), name]
    found: Sample = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def _forget(path: Path) -> None:
    """Drop a file's pages from the page cache, where the system lets us."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident(path: Path) -> float:
    """Return how many bytes of a file are in the page cache; NaN where the system cannot tell."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), size) as view:
        start = ctypes.c_char.from_buffer(view)
        try:
            failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(size), pages)
        except AttributeError:
            failed = -1
        del start
    return float("nan") if failed else float(sum(page & 1 for page in pages) * mmap.PAGESIZE)


def _read_ahead(path: Path) -> int | None:
    """Return the KiB that the system reads ahead on a path's disk."""
    device = path.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (place / "queue", place.resolve().parent / "queue"):  # of a disk, or of the disk of a partition
        with contextlib.suppress(OSError):
            return int((queue / "read_ahead_kb").read_text(encoding="ascii"))
    return None


def _read_disk_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


def _main(path: str, name: str) -> None:
    from engram_core import open_adapter

    _read_disk_bytes()  # so that reading it is not counted
    disk = _read_disk_bytes()
    start = perf_counter()
    adapter = open_adapter(path)
    opened = perf_counter()
    adapter.concept(name)
    stop = perf_counter()
    disk = _read_disk_bytes() - disk
    print(json.dumps({"open_s": opened - start, "concept_s": stop - opened, "disk_bytes": disk}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
