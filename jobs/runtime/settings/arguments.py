"""The arguments of every command: what `--help` says and what is refused. No import of torch, pyspark or pandas."""

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
    "vectors": "tables slide_vectors and patient_vectors: one vector per slide and per patient",
    "splits": "table splits, column patients.split and CSVs: which patients are in train, validation and test",
    "train": "a model on table patients, and its metrics on held-out patients",
    "predict": "table predictions and a CSV: probabilities of new patients by a trained model, from their slides on",
    "patches": "reads patches of pixels ahead of a trainer",
    "stainnet": "fits a StainNet checkpoint to your slides",
    "compact": "joins the small files that many waves and runs leave",
    "drop": "deletes the rows of an encoder that the settings no longer name",
    "doctor": "what works here and what does not, and how long the cohort takes",
}

_EXIT_STATUS = """\
exit status:
  0  done, every slide is accounted for and none failed
  3  done, but slides failed: each is named on stderr and in table slides (on_failed_slides: ignore makes this 0)
  2  bad settings, CSV or arguments: one line says what and where
  1  any other error; of the doctor: a check failed
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and exit."""
        _log.error("%s: %s; see --help", self.prog, printable(without_secrets(message)))
        self.exit(BAD_CONFIG)


def hours(text: str) -> float:
    """Returns a time above 0. Raises ValueError."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


_Options = dict[str, dict[str, Any]]  # an option's arguments of `add_argument`, by its name
_RETRY: _Options = {
    "--retry-failed": {"action": "store_true", "help": "work on failed slides again, even if nothing changed"}
}
_REDO = "deal all patients anew if the settings of splits changed; without this option, changed settings are refused"
_RESUME = "continue a stopped run after its last epoch, with its own settings"
_REPRODUCE = (
    "train the model of a finished run again, with its own settings and version of the table, and compare: exit status 1 if a "
    "number of any epoch differs"
)
_DEADLINE = "say how many executors the cohort needs to be done in HOURS"
_OWN_OPTIONS: dict[str, _Options] = {  # by job; a command line may have one of them
    "slides": _RETRY,
    "preprocess": _RETRY,
    "predict": _RETRY,
    "splits": {"--redo": {"action": "store_true", "help": _REDO}},
    "train": {
        "--resume": {"metavar": "RUN_ID", "help": _RESUME},
        "--reproduce": {"metavar": "RUN_ID", "help": _REPRODUCE},
    },
    "drop": {"--encoder": {"metavar": "NAME", "help": "the encoder whose rows are deleted; required"}},
    "doctor": {"--deadline": {"type": hours, "metavar": "HOURS", "help": _DEADLINE}},
}


def parse_arguments(job: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns config, overrides, print_config and the job's own options. Exits on --help and on bad arguments."""
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
    """The docstring of a module, read without an import."""
    spec = find_spec(module)
    loader: Any = spec.loader if spec else None
    return ast.get_docstring(ast.parse(loader.get_source(module))) if loader else None
