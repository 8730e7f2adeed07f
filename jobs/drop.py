"""Delete the rows of an encoder that the settings no longer name, from all tables that have rows per encoder.

The main job leaves such rows as they are, so that they are there if the settings name the encoder again. Predictions and models
stay.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from jobs.runtime.run.cli import DONE
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import ORIGINS, Job, Run
from jobs.runtime.run.summary import end_lines
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.settings.withheld import described
from jobs.runtime.tables.catalog import is_in
from udfs.schemas import TABLES
from udfs.wording import some
from udfs.wsi.store import public_uri

_KEYED = tuple(
    name
    for name, table in TABLES.items()
    if "encoder" in table.schema.names and not table.schema.field("encoder").nullable
)
JOB = Job("drop", writes=_KEYED)


def drop(run: Run, arguments: argparse.Namespace) -> int:
    """Delete the rows of an encoder table by table; report how many."""
    encoder, tables, root = arguments.encoder, run.tables, public_uri(run.config.output.root)
    if encoder is None:
        raise ConfigError("--encoder is required: the name of the encoder whose rows are deleted")
    if encoder in run.config.encoders:
        raise ConfigError(
            f"--encoder {encoder}: the settings name this encoder, so the next run would make its rows again: take it out of "
            "encoders first"
        )
    existing = [name for name in _KEYED if tables.exists(name)]
    n_rows: dict[str, dict[str, int]] = {}
    for name in existing:
        counted = tables.read(name).groupBy("encoder").count().collect()
        n_rows[name] = {row["encoder"]: row["count"] for row in counted}
    known = sorted({name for of_table in n_rows.values() for name in of_table})
    if encoder not in known:
        have = some(known) if known else "none"
        raise ConfigError(
            f"--encoder {described(encoder)}: no table in {root} has rows of it; the encoders there: {have}"
        )
    lines = ["", f"slidelake drop, run {run.record.run_id}"]
    for name in existing:
        number = n_rows[name].get(encoder, 0)
        with run.progress.stage(name):
            origins = json.loads(tables.property(name, ORIGINS) or "{}")
            if encoder in origins:
                del origins[encoder]
                tables.set_property(name, ORIGINS, json.dumps(origins, sort_keys=True))
            if number:
                tables.delete(name, is_in("encoder", [encoder]))
        run.record.counts[f"{name}_rows_deleted"] = number
        lines.append(f"  {name:<15} {number:,} rows deleted")
    lines += end_lines(run.record, root)
    lines.append("  next      the files stay, for readers of older versions: Delta's VACUUM deletes them")
    print("\n".join(lines))
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, drop, argv)


if __name__ == "__main__":
    sys.exit(main())
