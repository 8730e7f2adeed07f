"""The arguments of every command: what `--help` says and what is refused. Imports neither torch nor pyspark nor pandas."""

import argparse
import ast
import logging
import math
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from jobs.runtime.settings.withheld import without_secrets
from udfs.wording import printable

_log = logging.getLogger("slidelake.arguments")
BAD_CONFIG = 2  # the exit status of bad settings, CSV or arguments

JOBS = {
    "preprocess": "slides to patients, in one Spark application",
    "slides": "tables slides and tiles: headers, tissue, tile coordinates",
    "features": "table features: embeddings and colours of the tiles",
    "patients": "table patients: one row per patient, with its bags",
    "splits": "table splits, column patients.split and CSVs: who is in train, validation and test",
    "train": "a model on table patients, and how good it is on those held out",
    "predict": "table predictions and a CSV: probabilities of new patients by a trained model, from their slides on",
    "patches": "read patches of pixels ahead of a trainer",
    "stainnet": "fit a StainNet checkpoint to your slides",
    "compact": "join the small files that many waves and runs leave",
    "doctor": "what works here and what does not, and how long the cohort would take",
}

_EXIT_STATUS = """\
exit status:
  0  done, every slide is accounted for and none failed
  3  done, but slides failed: each is named on stderr and in table slides (on_failed_slides: ignore makes this 0)
  2  bad settings, CSV or arguments: one line says what and where
  1  anything else; of doctor: a check failed
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        _log.error("%s: %s; see --help", self.prog, printable(without_secrets(message)))
        self.exit(BAD_CONFIG)


def hours(text: str) -> float:
    """Returns a time above 0; raises ValueError."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


_RETRY: dict[str, dict[str, Any]] = {
    "--retry-failed": {"action": "store_true", "help": "work on failed slides again, though nothing changed"}
}
_OWN_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {  # by job; a command line may have one of them
    "slides": _RETRY,
    "preprocess": _RETRY,
    "predict": _RETRY,
    "splits": {
        "--redo": {
            "action": "store_true",
            "help": "if other settings dealt the patients, deal all of them anew; else that is refused, since a patient keeps "
            "its split",
        }
    },
    "train": {
        "--resume": {
            "metavar": "RUN_ID",
            "help": "go on with a run that was stopped, from its last epoch, with its own settings",
        },
        "--reproduce": {
            "metavar": "RUN_ID",
            "help": "train a finished run's model again, on the same version of the table and with its own settings, and "
            "compare: exit status 1 if a figure of any epoch differs",
        },
    },
    "doctor": {
        "--deadline": {
            "type": hours,
            "metavar": "HOURS",
            "help": "tell how many executors the cohort needs to be done in so many hours",
        }
    },
}


def parse_arguments(job: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns config, overrides, print_config and the job's own options; exits on --help and on bad arguments."""
    # pydantic and the store's clients, which `slidelake --help` does without
    from jobs.runtime.settings.config import describe_settings  # noqa: PLC0415
    from jobs.runtime.settings.job_sections import ONE_JOBS  # noqa: PLC0415

    settings = "\n".join(
        textwrap.fill(f"{text} [{default}]", 118, initial_indent=f"  {key:<32} ", subsequent_indent=" " * 35)
        for key, default, text in describe_settings()
        if ONE_JOBS.get(key.partition(".")[0], job) == job
    )
    parser = Parser(
        prog=f"slidelake {job}",
        description=_docstring(f"jobs.{job}"),
        epilog=f"settings, in FILE or as key=value [default]; those of other jobs are left out:\n{settings}\n\n{_EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the settings, YAML; a path or any fsspec URI")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a setting, for example tiling.mpp=0.5")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved settings, secrets masked, and stop"
    )
    if options := _OWN_OPTIONS.get(job):
        own = parser.add_mutually_exclusive_group()
        for name, option in options.items():
            own.add_argument(name, **option)
    return parser.parse_intermixed_args(argv)


def _docstring(module: str) -> str | None:
    """The docstring of a module that is not imported."""
    spec = find_spec(module)
    loader: Any = spec.loader if spec else None
    return ast.get_docstring(ast.parse(loader.get_source(module))) if loader else None
