"""What commands import: --help answers before any heavy package is loaded."""

import json
import subprocess
import sys

from jobs.runtime.settings.arguments import JOBS

HEAVY = ("torch", "pyspark", "pandas", "tifffile")
HELP = """
import json, sys
from jobs.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["slidelake", *words]
    try:
        status = main()
    except SystemExit as exit_:
        status = exit_.code
    assert not status, (words, status)
    print("loaded", json.dumps([words, sorted(sys.modules)]))
"""


def said_by(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_help_of_every_command_loads_no_heavy_package() -> None:
    commands = [["--help"], *([job, "--help"] for job in JOBS), ["submit", "--help"]]
    lines = said_by(HELP, json.dumps(commands))
    loaded = [json.loads(line.removeprefix("loaded ")) for line in lines if line.startswith("loaded ")]
    assert [words for words, _ in loaded] == commands
    for words, modules in loaded:
        assert not {name.partition(".")[0] for name in modules} & {*HEAVY}, words
    assert not {"pydantic", "fsspec"} & {*loaded[0][1]}
