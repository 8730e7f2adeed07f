"""Checks of what is read: slides from their store, weights of the models."""

from collections.abc import Iterator
from functools import partial
from itertools import islice

from py4j.protocol import Py4JJavaError

from jobs.checks.place import ExecutorError, MissingPackageError, Place, telling_line
from jobs.checks.table import Row
from udfs.reach_store import read_range
from udfs.sample_cohort import load
from udfs.wording import some
from udfs.wsi import ErrorCode
from udfs.wsi.store import StoreUri, absolute_uri, public_uri

_SLIDES_TRIED = 5  # a slide may be missing though the store is fine


def store(place: Place) -> Row:
    """Says whether an executor reads a range of a slide."""
    problem = "no slide of the CSV was found"
    for uri in islice(_uris(place), _SLIDES_TRIED):
        reached = place.ask_any(partial(read_range, uri, place.config.slides.storage_options))
        if reached.error is None:
            ms = 1000 * reached.seconds
            return Row("ok", f"{reached.host} read {reached.n_bytes:,} bytes of {public_uri(uri)} in {ms:.0f} ms")
        problem = f"{reached.host}: {reached.error.value}: {reached.message}"
        if reached.error is not ErrorCode.FILE_MISSING:
            break
    if lacking := place.lacking(place.store_packages):  # then nothing is known of the store
        raise MissingPackageError(some(lacking))
    return Row(
        "FAIL",
        problem,
        "executors need a route to the store (proxy, firewall, endpoint), a mount if it is a folder, and credentials: "
        "slides.storage_options, or an identity of their own",
    )


def encoder(place: Place) -> Row:
    """Says whether every executor loads the same models as the driver; loading ends with a forward pass."""
    remedy = (
        "put the encoders' weights and stain.weights where all nodes can read them: a URI, or a path on every node; for weights "
        "of the hub, executors need a route to it, and HF_TOKEN if they are gated (spark.executorEnv.HF_TOKEN)"
    )
    here = place.run.models  # raises ConfigError with a remedy
    try:
        loaded = place.ask_every(partial(load, place.run.feature_spec))
    except (ExecutorError, Py4JJavaError) as error:
        return Row("FAIL", f"executors cannot load it: {telling_line(error)}", remedy)
    for one in loaded:
        if one.identities != here.identities:
            return Row("FAIL", f"{one.host} has other weights than the driver at the same place", remedy)
    names = some([f"{name} ({encoder.weights[:8]})" for name, encoder in here.encoders.items()])
    places = some(sorted({f"{one.host} by {one.device}" for one in loaded}))
    return Row("ok", f"{names} on driver and executors, on {places}")


def _uris(place: Place) -> Iterator[StoreUri]:
    """Yields URIs of slides as the CSV gives them; if it gives none, of the files that were found."""
    given = [absolute_uri(image.uri) for image in place.images if image.uri]
    yield from given or (found.uri for found in place.located.values() if found.uri)
