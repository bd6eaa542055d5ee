"""The page, or a comparison: see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.report import comparison, page
from benchmarks.report.results import load

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=report.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = ROOT / "benchmarks"
    parser.add_argument("--results", type=Path, default=folder / "results", help="of all devices")
    parser.add_argument("--examples", type=Path, default=ROOT / "examples")
    parser.add_argument("--out", type=Path, default=folder / "REPORT.md")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--threshold", type=float, default=comparison.THRESHOLD)
    parser.add_argument(
        "--fail-on-slower", action="store_true", help="status 1, also where a result became wrong"
    )
    args = parser.parse_args()
    try:
        if args.compare is None:
            page.write(args.results, args.examples, args.out)
            print(args.out)
            return 0
        old, new = map(load, args.compare)
        found = comparison.compare(old, new, args.threshold)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(comparison.text(old, new, found))
    worse = found.is_wrong or any(each.verdict == "slower" for each in found.differences)
    return int(args.fail_on_slower and bool(worse))


if __name__ == "__main__":
    sys.exit(main())
