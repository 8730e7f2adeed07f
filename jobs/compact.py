"""Optional: join the small files that many waves and runs leave in tiles, features and patients. No row changes."""

import argparse
import sys
from collections.abc import Sequence

from jobs.runtime.run.cli import DONE
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import Job, Run
from jobs.runtime.run.summary import end_lines, readable_size
from jobs.runtime.settings.config import ConfigError
from udfs.wsi.store import public_uri

JOB = Job("compact", writes=("tiles", "features", "patients"))


def compact(run: Run, arguments: argparse.Namespace) -> int:
    """Compacts table by table; reports files and bytes."""
    del arguments
    tables, record, root = run.tables, run.record, public_uri(run.config.output.root)
    if not all(map(tables.exists, JOB.writes)):
        raise ConfigError(f"no tables in {root}: run the preprocess job first")
    lines = ["", f"slidelake compact, run {record.run_id}"]
    for name in JOB.writes:
        tables.create(name)  # with the properties that a table of an older version lacks
        before = tables.size(name)
        with run.progress.stage(name):
            tables.compact(name)
        after = tables.size(name)
        record.counts.update({f"{name}_files_before": before[0], f"{name}_files_after": after[0]})
        lines.append(f"  {name:<9} {_files(*before)}, now {_files(*after)}")
    lines += end_lines(record, root)
    lines.append("  next      the old files stay, for readers of older versions: Delta's VACUUM deletes them")
    print("\n".join(lines))
    return DONE


def _files(number: int, n_bytes: int) -> str:
    return f"{number:,} {'file' if number == 1 else 'files'} of {readable_size(n_bytes)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns the exit status."""
    return run_main(JOB, compact, argv)


if __name__ == "__main__":
    sys.exit(main())
