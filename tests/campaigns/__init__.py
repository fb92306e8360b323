"""Campaigns: seeded stress tests that inject random faults and hostile inputs.

    python -m tests.campaigns.<name> [--cases N] [--seed S]

A campaign is a module with a function `run(cases, rng)` that yields, for each case, None or one line that says what
failed, and a `main` guard that calls `campaign()`. The last line that it prints is its result: how many cases ran, how
many failed, and the seed that reproduces them. `make campaign` runs all of them at their full size; the tests run a few
cases of each.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator

Run = Callable[[int, random.Random], Iterator[str | None]]


def campaign(name: str, run: Run, cases: int) -> None:
    """Run a campaign from the command line with --cases [default: `cases`]; exit with 1 if a case fails."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.campaigns.{name}")
    parser.add_argument("--cases", type=int, default=cases, help="[default: %(default)s]")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="[default: the current time]")
    options = parser.parse_args()
    failures = count = 0
    for failure in run(options.cases, random.Random(options.seed)):
        count += 1
        if failure is not None:
            failures += 1
            print(f"{name}: case {count}: {failure}", file=sys.stderr, flush=True)
    print(f"{name}: {count} cases, {failures} failures, seed {options.seed}", flush=True)
    sys.exit(1 if failures else 0)
