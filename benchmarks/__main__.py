"""`python -m benchmarks [--only NAME,NAME]`: run benchmarks, print a line a measurement, then all of them as a table."""

import argparse
import importlib
import sys
import traceback

from benchmarks.machine import described, take_one_core
from benchmarks.measure import Line, show, shown

NAMES = (  # each a module of this package with run()
    "read_local",
    "read_sparse",
    "read_remote",
    "open_remote",
    "mask_flat",
    "mask_pyramid",
    "stain",
    "histogram",
    "feed",
    "encode",
    "features",
    "job",
    "patches",
    "memory",
    "predict",
    "scale",
    "learn",
    "gpu",
    "gpu_training",
)
ON_REQUEST = ("growth",)  # a quarter of an hour or more, so only where --only names it


def main(arguments: list[str] | None = None) -> int:
    """Run them; 2 where a name is not known, 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split(":")[1].strip())
    known = (*NAMES, *ON_REQUEST)
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAMES", help=f"some of {','.join(known)}")
    names = [name.strip() for name in parser.parse_args(arguments).only.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}: choose from {', '.join(known)}")
    take_one_core()
    print(described(), flush=True)
    lines: list[tuple[str, Line]] = []
    failed = []
    for name in names:
        try:
            for line in importlib.import_module(f"benchmarks.{name}").run():
                lines.append((name, line))
                print(show(name, line), flush=True)
        except Exception:  # the others took long, too
            traceback.print_exc()
            failed.append(name)
    print(f"\n{_table(lines)}")
    if failed:
        print(f"\nbenchmarks: failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _table(lines: list[tuple[str, Line]]) -> str:
    """A block a benchmark: keys down, its measurements across."""
    blocks = []
    for name in dict.fromkeys(name for name, _ in lines):
        measured = [line for other, line in lines if other == name]
        keys = list(dict.fromkeys(key for line in measured for key in line))
        rows = [(key, *(shown(line.get(key, "")) for line in measured)) for key in keys]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        body = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        blocks.append("\n".join([name, *(f"  {line}" for line in body)]))
    return "\n\n".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
