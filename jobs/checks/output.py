"""The check of output.root: the driver and an executor write there as Spark writes tables, and leave nothing."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from py4j.protocol import Py4JJavaError

from jobs.checks.place import TASKS_PER_EXECUTOR, Place, telling_line
from jobs.checks.table import Row
from jobs.runtime.spark.jvm import hadoop_path
from udfs.node_facts import sees_folder
from udfs.wording import some
from udfs.wsi.store import absolute_uri, public_uri

_REMEDY = (
    "set output.root to a URI whose scheme Spark knows (s3a://, abfss://, gs:// with their connectors) or to a folder on a disk "
    "that all nodes share, and give driver and executors the right to write there"
)


def output(place: Place) -> Row:
    """Says whether the driver and an executor can write to output.root."""
    root = absolute_uri(place.config.output.root).rstrip("/")
    shown, folder = public_uri(root), f"{root}/_doctor-{place.run.record.run_id}"
    try:
        with _made(place, folder):
            if "://" not in folder or folder.startswith("file://"):
                look = partial(sees_folder, folder.removeprefix("file://"))
                answers = place.ask(*[look] * (TASKS_PER_EXECUTOR * place.n_executors))
                blind = sorted({host for host, sees in answers if not sees})
                if blind:  # before they write to their own disks, where files would stay
                    return Row("FAIL", f"{shown} on the driver is another folder on {some(blind, 3)}", _REMEDY)
            try:
                place.spark.range(0, 1, 1, 1).selectExpr("'slidelake' AS text").write.text(f"{folder}/executor")
            except Exception as error:
                return Row("FAIL", f"{shown} cannot be written by executors ({telling_line(error)})", _REMEDY)
    except Py4JJavaError as error:
        return Row("FAIL", f"{shown} cannot be written by the driver ({telling_line(error)})", _REMEDY)
    return Row("ok", f"driver and an executor can write to {shown}")


@contextmanager
def _made(place: Place, folder: str) -> Iterator[None]:
    """Makes a folder with a file in it. After the block neither exists, nor any folder above that is new."""
    store, path = hadoop_path(place.spark, folder)
    above = [path]
    while (parent := above[-1].getParent()) is not None and not store.exists(parent):
        above.append(parent)
    try:
        store.mkdirs(path)
        store.create(path.suffix("/driver")).close()
        yield
    finally:
        with suppress(Py4JJavaError):  # a folder that others have written to stays
            store.delete(path, True)
            for parent in above[1:]:
                store.delete(parent, False)
