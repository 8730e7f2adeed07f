"""Where the figures of each epoch go: Delta table training_metrics, TensorBoard's event files, and MLflow if it is set."""

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from torch.utils.tensorboard import SummaryWriter

from jobs.training.model.files import ModelCard
from jobs.training.table_stores import delta_options
from udfs.schemas import TRAINING_METRICS
from udfs.wsi.store import StorageOptions, public_uri, redact, secrets_of, write_bytes

_log = logging.getLogger("slidelake.training")
Figures = Mapping[str, float]  # `SPLIT_NAME`: train_loss, validation_auroc, ...; and epoch


class RecordsError(Exception):
    """MLflow is set and cannot be used."""


class Records:
    """The figures of one run, until the block ends. A resumed run writes each epoch once as well."""

    def __init__(
        self,
        card: ModelCard,
        folder: str,
        table_uri: str,
        mlflow_uri: str | None,
        storage_options: StorageOptions | None,
        first_epoch: int = 0,
    ) -> None:
        """Begins, or continues at `first_epoch`: TensorBoard hides what a killed process wrote of this and later epochs.

        Event files are written to folder tensorboard of the model's `folder`. Table training_metrics is created if it is
        missing. `mlflow_uri` is the tracking URI, None for no MLflow; raises RecordsError if MLflow cannot be used.
        """
        self._run_id, self._table, self._options = card.model_id, table_uri, storage_options
        self._events = f"{folder.rstrip('/')}/tensorboard"
        self._is_table_written = True
        self._mlflow = _MlflowRun(mlflow_uri, self._run_id, card.training) if mlflow_uri else None
        self._local = tempfile.TemporaryDirectory(prefix="slidelake-events-")
        self._board = SummaryWriter(self._local.name, purge_step=first_epoch or None)

    def write(self, history: Sequence[Figures], new: Figures) -> None:
        """Writes the figures of the run so far, of which `new` are not yet written."""
        epoch = int(new["epoch"])
        for name, value in new.items():
            if name != "epoch" and math.isfinite(value):
                self._board.add_scalar(name.replace("_", "/", 1), value, epoch)
                if self._mlflow:
                    self._mlflow.call("log_metric", name, value, step=epoch)
        self._board.flush()
        self._send_events()
        try:
            write_metrics(self._table, self._run_id, history, self._options)
        except (DeltaError, OSError) as error:  # the training goes on, and the next epoch writes all rows
            if self._is_table_written:
                text = redact(" ".join(str(error).split()), secrets_of(self._table, self._options))
                where = public_uri(self._table)
                _log.warning("slidelake: %s cannot be written (%s): figures are in model.json too", where, text)
            self._is_table_written = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the records; for MLflow, the run failed if there is an error."""
        self._board.close()
        self._send_events()
        self._local.cleanup()
        if self._mlflow:
            self._mlflow.call("set_terminated", "FAILED" if kind else "FINISHED")

    def _send_events(self) -> None:
        for file in Path(self._local.name).iterdir():
            write_bytes(f"{self._events}/{file.name}", file.read_bytes(), self._options)


# Another run may commit between reading the table and writing it.
@retry(
    retry=retry_if_exception_type(CommitFailedError),
    stop=stop_after_attempt(8),
    wait=wait_random_exponential(0.2, max=5),
    reraise=True,
)
def write_metrics(
    table_uri: str, run_id: str, history: Sequence[Figures], storage_options: StorageOptions | None = None
) -> None:
    """Replaces the run's rows in table training_metrics.

    All rows of a run are written each time, so a run has one small file, not one per epoch, and no row twice.
    """
    rows = [
        {"run_id": run_id, "epoch": int(figures["epoch"]), "split": split, "name": metric, "value": value}
        for figures in history
        for split, metric, value in (
            (*name.split("_", 1), value if math.isfinite(value) else None)
            for name, value in figures.items()
            if name != "epoch"
        )
    ]
    data = pa.Table.from_pylist(rows, TRAINING_METRICS)
    options = delta_options(table_uri, storage_options)
    with suppress(TableNotFoundError):
        table = DeltaTable(table_uri, storage_options=options)
        write_deltalake(table, data, mode="overwrite", predicate=f"run_id = '{run_id}'")
        return
    write_deltalake(table_uri, data, mode="append", name="training_metrics", storage_options=options)


class _MlflowRun:
    """A run of MLflow with our run_id as its name. After an error of its client, the training goes on without it."""

    def __init__(self, uri: str, run_id: str, settings: Mapping[str, Any]) -> None:
        try:
            from mlflow.tracking import MlflowClient  # noqa: PLC0415 - an extra

            self._client: Any = MlflowClient(uri)
            found = self._client.get_experiment_by_name("slidelake")
            experiment = found.experiment_id if found else self._client.create_experiment("slidelake")
            runs = self._client.search_runs([experiment], f"tags.`mlflow.runName` = '{run_id}'", max_results=1)
            run = runs[0] if runs else self._client.create_run(experiment, run_name=run_id)
            self._id = run.info.run_id
            for name, value in () if runs else settings.items():
                self._client.log_param(self._id, name, value)
        except Exception as error:
            why = redact(next(iter(str(error).splitlines()), ""), secrets_of(uri, None))
            raise RecordsError(
                f"training.mlflow cannot be used ({type(error).__name__}: {why}): correct it, or leave it out"
            ) from None

    def call(self, method: str, *arguments: Any, **named: Any) -> None:
        """Calls a method of the client for this run."""
        try:
            if self._client:
                getattr(self._client, method)(self._id, *arguments, **named)
        except Exception as error:
            _log.warning("slidelake: MLflow cannot be reached (%s): the run goes on without it", type(error).__name__)
            self._client = None
