"""The command `slidelake submit`: runs a job at a place of conf/places, by the place's own client.

The place's file has the commands, word for word; the settings file and what `make dist` built go along.
"""

import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from types import FrameType
from typing import Any
from zipfile import ZipFile

from pydantic import Field, ValidationError

from jobs.runtime.settings.arguments import BAD_CONFIG, JOBS, Parser
from jobs.runtime.settings.config import ConfigError, load_config, masked_override
from jobs.runtime.settings.setting import Section
from jobs.runtime.settings.withheld import arguments_without_secrets, described, file_shown
from jobs.runtime.settings.yaml_text import YamlTextError, parse_yaml
from jobs.runtime.spark.signals import NAMES, handle_stop_signals, name_of, say, stop_signals
from jobs.runtime.spark.streams import log_to_stderr
from udfs.wording import named, new_run_id, printable, some

ROOT = Path(__file__).parents[1]
_log = logging.getLogger("slidelake.submit")
_FAILED = 1
_SIGNALLED = 128  # plus the number of the signal, as in shells
_BUILT = {  # by name in commands: what `make TARGET` builds, and TARGET
    "zip": ("dist/slidelake-{version}.zip", "dist"),
    "wheel": ("dist/slidelake-{version}-py3-none-any.whl", "dist"),
    "environment": ("dist/environment.tar.gz", "dist-env"),
}


class Destination(Section):
    """A place where jobs can run, as its file describes it.

    Its commands run one after the other, as in a shell, until one fails. $NAME stands for a name of `yours` or `_names`, the word
    $arguments for the job's arguments; in a word that is JSON, its texts have them.
    """

    yours: dict[str, str | None] = Field({})  # what the place's owner fills in, if a command needs it
    commands: list[str] = Field(min_length=1)

    def names(self) -> set[str]:
        """Returns the names that the commands use."""
        return {name for command in self.commands for name in Template(command).get_identifiers()}


def main(argv: Sequence[str]) -> int:
    """Prints or runs the commands of a place; returns the exit status, the last command's if all ran."""
    log_to_stderr()
    known = sorted(path.stem for path in (ROOT / "conf/places").glob("*.yaml"))
    parser = Parser(
        prog="slidelake submit",
        description=__doc__,
        usage="slidelake submit --on PLACE [--dry-run] JOB --config FILE [key=value ...] [the job's own options]",
        allow_abbrev=False,
    )
    parser.add_argument("--on", required=True, metavar="PLACE", help=f"a file of conf/places: {', '.join(known)}")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, secrets masked, and stop")
    parser.add_argument("job", metavar="JOB", help="see slidelake --help")
    parser.add_argument("--config", required=True, metavar="FILE", help="the settings, a file here; it goes along")
    given, arguments = parser.parse_known_args(argv)
    try:
        if given.job not in JOBS:
            raise ConfigError(f"no job {described(given.job)}; there are {', '.join(JOBS)}")
        place = _destination(given.on, known)
        settings = [word for word in arguments if "=" in word and not word.startswith("-")]
        shown = {word: masked_override(word) for word in settings}
        _check_settings(given.job, given.config, settings, place)
        names = _names(place, given.job, Path(given.config).absolute())
        if given.dry_run:
            safe = zip(arguments, arguments_without_secrets(arguments), strict=True)
            masked = [shown.get(word) or without_secret for word, without_secret in safe]
            print("\n".join(shlex.join(command) for command in commands(place, names, masked)))
            return 0
        with stop_signals():
            return _run(commands(place, names, arguments))
    except ConfigError as error:
        _log.error(printable(f"slidelake submit: {error}"))
        return BAD_CONFIG
    except KeyboardInterrupt as error:  # before a client ran, or between two
        _log.error("slidelake submit: stopped by %s", name_of(error))
        return _FAILED


def commands(place: Destination, names: Mapping[str, str], arguments: Sequence[str]) -> list[list[str]]:
    """Returns the commands of a place, each as its words; `arguments` are the job's, after --config FILE."""

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        if isinstance(part, list):
            return [word for item in part for word in (arguments if item == "$arguments" else [fill(item)])]
        return Template(part).substitute(names) if isinstance(part, str) else part

    def word(text: str) -> str:
        return json.dumps(fill(json.loads(text))) if text.startswith(("[", "{")) else str(fill(text))

    return [
        [filled for text in shlex.split(command) for filled in (arguments if text == "$arguments" else [word(text)])]
        for command in place.commands
    ]


def _destination(name: str, known: Sequence[str]) -> Destination:
    """Returns the description of a place. Refuses one whose commands need a name that is not filled in."""
    if name not in known:
        others = f"there are {', '.join(known)}" if known else f"there are none: it needs a checkout, not {ROOT}"
        raise ConfigError(f"no place {described(name)} in conf/places; {others}")
    file = f"conf/places/{name}.yaml"
    try:
        place = Destination.model_validate(parse_yaml((ROOT / file).read_text()))
    except YamlTextError as error:
        raise ConfigError(f"{file} is no place: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        wrong = some([f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()], separator="; ")
        raise ConfigError(f"{file} is no place: {wrong}") from None
    if empty := sorted(name for name, value in place.yours.items() if name in place.names() and not value):
        raise ConfigError(f"{file}: fill in {', '.join(empty)} under yours, as the file explains")
    return place


def _check_settings(job: str, config: str, settings: Sequence[str], place: Destination) -> None:
    """Refuses here what the job would refuse there, or would misread."""
    if not Path(config).is_file():
        raise ConfigError(f"--config {file_shown(config)}: no such file here: it goes along, so give a local one")
    loaded = load_config(config, settings, expand=False)
    if "config_name" not in place.names():
        return  # the driver reads the file here, and its paths
    for key, path, _ in loaded.locations(job):
        is_given = any(word.startswith(f"{key}=") for word in settings)
        by_place = not is_given and any(f"{key}=" in command for command in place.commands)
        if not by_place and not _is_whole(path):
            raise ConfigError(
                f"{key} = {named(path)} would be below a folder of the driver's own, which is in the cluster: give a URI, or the "
                "whole path on a disk that all nodes share"
            )


def _is_whole(path: str) -> bool:
    """Returns whether a path or URI means the same on any machine: it is not below a current folder or a home."""
    link = path.rpartition("::")[2]  # of simplecache::s3://...
    local = re.match(r"(file|local):(//)?(.*)", link, re.DOTALL)
    is_uri = "://" in link or link.startswith("hf-hub:")
    return Path(local[3]).is_absolute() if local else is_uri or Path(link).is_absolute()


def _names(place: Destination, job: str, config: Path) -> dict[str, str]:
    """Returns what a place's commands may use, beside the arguments of the job."""
    names = {
        "job": job,
        "script": str(ROOT / f"jobs/{job}.py"),
        "root": str(ROOT),
        "config": str(config),
        "config_name": config.name,
        "python": sys.executable,
        "version": version("slidelake"),
        "submission": new_run_id(),  # a folder per submission: a job that waits finds its files as they were sent
    }
    needed = place.names()
    names |= {name: str(_built(*_BUILT[name])) for name in needed & _BUILT.keys()}
    names |= {name: value for name, value in place.yours.items() if value}
    if unknown := sorted(needed - names.keys() - {"arguments"}):
        raise ConfigError(
            f"conf/places: no ${unknown[0]}: there are {', '.join(sorted(names))}, and the names under yours"
        )
    return names


def _built(name: str, target: str) -> Path:
    """Returns a file that `make target` built. Refuses a file that is missing or older than its sources."""
    file = ROOT / name.format(version=version("slidelake"))
    if not file.exists():
        raise ConfigError(f"{file} does not exist: run `make {target}`")
    modules = [path for top in ("jobs", "udfs") for path in (ROOT / top).rglob("*.py")]
    sources = [ROOT / "conf/locks/runtime.txt"] if target == "dist-env" else [ROOT / "pyproject.toml", *modules]
    if newer := [path for path in sources if path.stat().st_mtime > file.stat().st_mtime]:
        raise ConfigError(f"{file} is older than {newer[0].relative_to(ROOT)}: run `make {target}`")
    if target == "dist":
        # By name: no time shows that a module was deleted, since a new __pycache__ changes its folder's time too.
        packed = {name for name in ZipFile(file).namelist() if name.endswith(".py")}
        if moved := sorted(packed ^ {path.relative_to(ROOT).as_posix() for path in modules}):
            raise ConfigError(f"{file} and the checkout differ in {moved[0]}: run `make {target}`")
    return file


def _run(lines: Sequence[Sequence[str]]) -> int:
    """Runs one after the other; returns the exit status of the first that failed, or 0."""
    if missing := sorted({line[0] for line in lines if not shutil.which(line[0])}):
        raise ConfigError(f"no {missing[0]} on PATH: install it, or activate the environment that has it")
    return next((status for line in lines if (status := _status_of(line))), 0)


def _status_of(line: Sequence[str]) -> int:
    """Runs a command that gets the signals of this process, and time to end in order; returns its exit status."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        if number != signal.SIGINT:  # Ctrl-C reaches the command in the terminal
            say(f"submit: stopped by {NAMES[signal.Signals(number)]}: {line[0]} gets it too, and ends in order")
            client.send_signal(number)

    with stop_signals(), subprocess.Popen(line) as client:  # between two clients, a signal stops this command
        handle_stop_signals(pass_on)
        status = client.wait()
    return _SIGNALLED - status if status < 0 else status or (_SIGNALLED + received[0] if received else 0)
