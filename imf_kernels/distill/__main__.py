"""`python -m imf_kernels.distill config.yaml`: a run from its config, also under `torchrun`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from imf_kernels.distill import config as configs
from imf_kernels.distill import document, schema
from imf_kernels.distill.stops import RankFailed, Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, search grids, write the student: the process's exit status.

    0; 1 after an error, which is told in a line; 143 or 130 where SIGTERM or SIGINT has stopped the
    run, which is saved.
    """
    said, first = _parser().parse_args(arguments), os.environ.get("RANK", "0") == "0"
    try:
        run(configs.load(said.config, said.set), dry=said.dry_run)
    except Stopped as stopped:
        if first:
            print(stopped, file=sys.stderr)
        return stopped.status
    except RankFailed:  # which has said why
        return 1
    except Exception as error:
        if said.debug:
            raise
        if isinstance(error, schema.ConfigError) and not first:
            return 1  # all ranks have read the same document
        kind = "" if isinstance(error, schema.ConfigError) else f"{type(error).__name__}: "
        lines = [str(error), *getattr(error, "__notes__", ())]
        print(f"error: {kind}{' '.join('. '.join(lines).split())}", file=sys.stderr)
        return 1
    return 0


def run(config: configs.Config, *, dry: bool = False) -> None:
    """What the command does. `dry`: tell what would be trained, and stop."""
    from imf_kernels.distill import build, finish, start

    start.check_places(config)
    document.check_resume(config)
    made = build.build(config)
    trained, frozen = build.counts(made.student)
    if made.accelerator.is_main_process:
        said = f"student: {trained:,} parameters trained, {frozen:,} frozen\n"
        said += made.about
        if dry:
            said = f"{document.described(config)}{said}\n{start.goes_on(config) or 'begins anew'}"
        print(said, flush=True)
    if dry:
        return
    made.trainer().run()
    student = finish.whole(made)
    found = finish.search_grids(made, student)
    if made.accelerator.is_main_process:
        finish.write(made, student, found)
        print(f"student: {config.output.path}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m imf_kernels.distill",
        description=__doc__,
        epilog="Exit status: 0 when the student is written, 1 after an error; 143 after SIGTERM, "
        "130 after SIGINT, which save: the same command goes on.",
    )
    parser.add_argument("config", help="a YAML document, see docs/distilling.md")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="training.lr=1e-4",
        help="a value in the place of the document's; as often as wanted",
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would be trained, stop")
    parser.add_argument("--debug", action="store_true", help="errors with their trace")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # "package.module:function" may be the run's own
    sys.exit(main())
