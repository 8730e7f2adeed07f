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
    commands = [["--help"], *([job, "--help"] for job in JOBS), ["submit", "--help"], ["encoders", "--help"]]
    lines = said_by(HELP, json.dumps(commands))
    loaded = [json.loads(line.removeprefix("loaded ")) for line in lines if line.startswith("loaded ")]
    assert [words for words, _ in loaded] == commands
    for words, modules in loaded:
        assert not {name.partition(".")[0] for name in modules} & {*HEAVY}, words
    assert not {"pydantic", "fsspec"} & {*loaded[0][1]}


IMPORT = """
import json, logging, pkgutil, warnings
from importlib import import_module

import pyspark.sql, tifffile, timm, torch
import jobs.runtime, udfs

def state():
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    set_up = sorted((each.name, each.level, str(each.handlers)) for each in loggers if each.level or each.handlers)
    return [str(set_up), str(logging.root.handlers), str(warnings.filters), torch.get_num_threads()]

before = state()
for package in (udfs, jobs.runtime):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        import_module(module.name)
print(json.dumps([before, state()]))
"""


def test_to_import_a_library_module_changes_nothing_global() -> None:
    before, after = json.loads(said_by(IMPORT)[-1])
    assert after == before
