"""Feed damaged adapter files to the reader: `python packages/engram-core/fuzz/run.py --mutations 100000`.

Each mutant goes through everything the library does with a file. That happens in another process, so that even a
crash of the interpreter is a finding and not the end. The exit status is 1 if anything was found.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from core_judge import MEMORY_FACTOR, MEMORY_FIXED, SECONDS, FindingError, judge
from core_mutants import make_mutant

ADDRESS_SPACE = 8 << 30  # bytes: what a mutant makes the library ask for in vain is noticed as well
REPORT_SECONDS = 10.0


def main() -> int:
    """Run the fuzzer and return the exit status."""
    settings = parse_arguments()
    counts: Counter[str] = Counter()
    findings: list[tuple[int, str]] = []
    ratio = 0.0
    begun = reported = time.monotonic()
    for number, outcome, detail, memory in take_through(settings):
        counts[outcome] += 1
        ratio = max(ratio, memory)
        if outcome == "finding":
            findings.append((number, detail))
            print(f"mutant {number}: {detail}", flush=True)
            if settings.save is not None:
                settings.save.mkdir(parents=True, exist_ok=True)
                (settings.save / f"{settings.seed}-{number}.safetensors").write_bytes(
                    make_mutant(settings.seed, number)[1]
                )
        now = time.monotonic()
        if now - reported > REPORT_SECONDS:
            reported = now
            done = counts.total()
            print(f"{done} of {settings.mutations}, {done / (now - begun):.0f}/s, {len(findings)} findings", flush=True)
        if settings.seconds is not None and now - begun > settings.seconds:
            break
    print(
        f"{counts.total()} mutants of seed {settings.seed} in {time.monotonic() - begun:.0f} s: "
        + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("refused", "half refused", "accepted", "finding"))
    )
    print(
        f"memory: at most {ratio:.0%} of what is allowed, {MEMORY_FIXED} bytes and {MEMORY_FACTOR} for each of its own "
        f"(measured for one mutant in {settings.measure_every})"
    )
    return 1 if findings else 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000, help="how many files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other files (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds")
    parser.add_argument(
        "--measure-every", type=int, default=20, help="measure memory for one file in so many (default: %(default)s)"
    )
    parser.add_argument("--save", type=Path, help="folder for the files that made a finding")
    return parser.parse_args()


def take_through(settings: argparse.Namespace) -> Iterator[tuple[int, str, str, float]]:
    """Yield each mutant's number, outcome, detail and share of the allowed memory; survive the death of a process."""
    context = multiprocessing.get_context("spawn")
    number, last = settings.first, settings.first + settings.mutations
    with tempfile.TemporaryDirectory() as folder:
        while number < last:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(sender, settings, Path(folder), number, last), daemon=True)
            process.start()
            sender.close()
            try:
                while number < last:
                    # Beyond the alarm inside of the process: code that does not return to Python hears no alarm.
                    if not receiver.poll(60 + 4 * SECONDS):
                        yield number, "finding", "hangs", 0.0
                        break
                    yield receiver.recv()
                    number += 1
            except EOFError:
                process.join()
                yield number, "finding", f"the process died with status {process.exitcode}", 0.0
            finally:
                process.kill()
                process.join()
            number += 1


def work(sender: Connection, settings: argparse.Namespace, folder: Path, first: int, last: int) -> None:
    """Judge mutants and send what comes out."""
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for number in range(first, last):
        how, data = make_mutant(settings.seed, number)
        try:
            outcome, peak = judge(data, folder, measure=number % settings.measure_every == 0)
        except FindingError as finding:
            sender.send((number, "finding", f"{how}: {finding}", 0.0))
        else:
            sender.send((number, outcome, how, peak / (MEMORY_FIXED + MEMORY_FACTOR * len(data))))


if __name__ == "__main__":
    sys.exit(main())
