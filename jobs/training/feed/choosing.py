"""Which patients of a table are fed, and as what: by split or by name, their labels as numbers, one type and width."""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from jobs.training.feed.bags import EMBEDDINGS
from jobs.training.feed.epochs import FedPatient
from jobs.training.refusals import FeedError
from jobs.training.table_versions import PinnedTable
from udfs.wording import named, some


def choose(
    table: PinnedTable,
    encoder: str,
    split: Collection[str] | None,
    patients: Collection[str] | None,
    columns: Sequence[str],
    classes: Sequence[str] | None,
    bag_size: int | None,
) -> tuple[list[FedPatient], tuple[str, ...], str, int]:
    """Returns patients with a bag of an encoder in the order of the table, classes, and type and columns of a fed bag.

    The patients are those of some splits, or some by name, or all. With `classes` empty, labels are ignored.

    Raises:
        FeedError: no patient, a requested patient is missing or has two rows, its label is no class, or bags differ in
            width.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing and table.columns:
        raise FeedError(f"{table.name} has no column {', '.join(missing)}: run the patients job")
    rows = _rows(table, encoder, split, patients)
    chosen = table.rows.take(rows).to_pydict()
    if classes is None:
        classes = sorted({label for label in table.rows["label"].to_pylist() if label is not None})
    number = {label: i for i, label in enumerate(classes)}
    labels = set(chosen["label"]) - {None} if number else set()
    unknown = sorted(labels - number.keys())
    if unknown:
        wrong, known = some(list(map(named, unknown))), some(list(map(named, classes)), 20)
        raise FeedError(
            f"{table.name} has patients of {wrong}, the classes are {known}: correct the labels, or take all classes"
        )
    dims = sorted(set(chosen["embedding_dim"]))
    if len(dims) > 1:
        raise FeedError(f"{table.name} has bags of {dims} columns of encoder {encoder}: run the main job again")
    n_bags = sum(name in EMBEDDINGS for name in columns)
    dtypes = [dtype or "float32" for dtype in chosen["embedding_dtype"]]
    fed = "float16" if set(dtypes) == {"float16"} else "float32"
    ends = np.cumsum([group.n_rows for group in table.groups])
    listed = [
        FedPatient(
            patient_id=chosen["patient_id"][i],
            center_id=chosen["center_id"][i] or "",
            label=number.get(chosen["label"][i], -1),
            n_tiles=chosen["n_tiles"][i],
            dim=dims[0],
            dtype=dtypes[i],
            file=table.groups[group].file,
            group=group,
            row=rows[i] - int(ends[group]) + table.groups[group].n_rows,
            n_bytes=(bag_size or chosen["n_tiles"][i]) * dims[0] * n_bags * np.dtype(fed).itemsize,
        )
        for i, group in enumerate(np.searchsorted(ends, rows, side="right").tolist())
    ]
    return listed, tuple(classes), fed, dims[0] * n_bags


def _rows(
    table: PinnedTable, encoder: str, split: Collection[str] | None, patients: Collection[str] | None
) -> list[int]:
    """Returns the numbers of the chosen rows, ascending."""
    ids = table.rows["patient_id"].to_pylist()
    rows = [i for i, of_row in enumerate(table.rows["encoder"].to_pylist()) if of_row == encoder]
    n_rows = Counter(ids[i] for i in rows)
    twice = sorted(patient for patient, count in n_rows.items() if count > 1)
    if twice:
        raise FeedError(
            f"{table.name} has several rows of patients {some(twice)}: a patient must be one row per encoder"
        )
    where = f"{table.name}, encoder {encoder},"
    if patients is not None:
        wanted = set(patients)
        missing = sorted(wanted - n_rows.keys())
        if missing:
            raise FeedError(f"{where} has no patients {some(missing)}, {len(missing)} of {len(wanted)} requested")
        rows = [i for i in rows if ids[i] in wanted]
    elif split is not None:
        splits = table.rows["split"].to_pylist()
        rows = [i for i in rows if splits[i] in split]
        if not rows:
            existing = ", ".join(sorted({name for name in splits if name})) or "none"
            raise FeedError(
                f"{where} has no patient of split {', '.join(split)}, its splits are {existing}: run the splits job"
            )
    if not rows:
        raise FeedError(f"{where} has no patients to feed")
    return rows
