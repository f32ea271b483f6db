"""Cut damaged media files by the thousand and count what came of them.

    python -m tests.bench.fuzz --count 1000

Each is cut in a process with a limit of memory and time. A file that gave neither clips nor a
failure with a code is kept, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.support.fuzz import campaign, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first file's number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for files with a bad outcome")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="kpmask-fuzz-"))
    numbers = range(options.first, options.first + options.count)
    trials = []
    for trial in campaign(folder, numbers, seed=options.seed):
        trials.append(trial)
        if not trial.outcome.is_good:
            print(f"{trial} in {folder}", file=sys.stderr, flush=True)
    print(table(trials))
    return int(any(not trial.outcome.is_good for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
