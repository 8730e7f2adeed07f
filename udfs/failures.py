"""How a failure inside a UDF becomes a row, and when a UDF gives up on a slide so that Spark does not give up on the run."""

from pyspark import TaskContext

from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.store import StorageOptions, public_uri, redact, secrets_of

DEATHS_BEFORE_QUARANTINE = 2


def check_quarantine(image_id: str) -> None:
    """Gives up on a slide that already killed its process twice. The task must hold one slide only.

    Raises:
        SlideError: `worker_died`.
    """
    context = TaskContext.get()
    deaths = context.attemptNumber() if context else 0
    if deaths >= DEATHS_BEFORE_QUARANTINE:
        raise SlideError(
            ErrorCode.WORKER_DIED,
            f"the worker died {deaths} times on slide {image_id} (a crash of a codec, or out of memory): look at the "
            "executor's log, give executors more memory or convert the slide, then run with --retry-failed",
        )


def as_slide_error(error: Exception, uri: str | None, storage_options: StorageOptions) -> SlideError:
    """Returns the error for the slide's row: an unforeseen error keeps its type and text, without secrets.

    Raises:
        MemoryError: the error is one.
    """
    if isinstance(error, MemoryError):
        raise error  # the task is tried again, perhaps beside smaller ones, and quarantined if that does not help
    if isinstance(error, SlideError):
        return error
    text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, storage_options))
    where = public_uri(uri) if uri else "no uri"
    return SlideError(ErrorCode.INTERNAL_ERROR, f"{where}: {text}; this is a fault of slidelake, please report it")
