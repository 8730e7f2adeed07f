"""What every command refuses in the same way: arguments that can't be used. Imports little, so that it is there at once."""

import argparse
from typing import NoReturn

from jobs.runtime.settings.withheld import without_secrets
from udfs.wording import printable

BAD_CONFIG = 2  # the exit status of bad settings, CSV or arguments


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(BAD_CONFIG, f"{self.prog}: {printable(without_secrets(message))}; see --help\n")
