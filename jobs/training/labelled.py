"""The patients that a model is trained, validated and tested on: those with a label in one version of table patients."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, fields

from jobs.training.model.files import SplitCard
from jobs.training.model.predictions import HELD_OUT_COLUMNS, SUBMISSION_COLUMNS
from jobs.training.refusals import NoTableError
from jobs.training.splitting import SPLITS, ClassGaps, missing_classes
from jobs.training.table_versions import pin_table, read_columns
from udfs.labels import is_no_value, twins
from udfs.wording import quoted, some
from udfs.wsi.store import StorageOptions, public_uri


class CohortError(Exception):
    """The patients cannot be trained on; one line with reason and remedy."""


@dataclass(frozen=True)
class Member:
    """A patient."""

    patient_id: str
    center_id: str
    label: str
    params_hash: str
    run_id: str


@dataclass(frozen=True)
class TrainingSet:
    """The labelled patients with a bag of one encoder in a version of table patients."""

    table_uri: str
    version: int
    encoder: str
    splits: dict[str, list[Member]]  # train, validation, test, each by patient_id
    unlabelled: int  # patients with a split and no label, who are left out
    unassigned: int  # patients without a split
    dim: int  # columns of one bag
    splits_version: int | None = None  # of table splits, if a fold is validated on

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels of split train, sorted."""
        return tuple(sorted({member.label for member in self.splits["train"]}))

    @property
    def centers(self) -> tuple[str, ...]:
        """The centres of split train, sorted."""
        return tuple(sorted({member.center_id for member in self.splits["train"]}))

    @property
    def prior(self) -> tuple[float, ...]:
        """The share of each class in split train."""
        counts = self.counts("train")
        return tuple(count / sum(counts) for count in counts)

    def counts(self, split: str) -> list[int]:
        """Returns the number of patients of each class."""
        found = Counter(member.label for member in self.splits[split])
        return [found[name] for name in self.classes]

    def class_gaps(self) -> ClassGaps:
        """Returns the splits that lack a class."""
        return missing_classes({name: [member.label for member in self.splits[name]] for name in SPLITS})

    def ids(self, split: str) -> list[str]:
        """Returns the patient_ids of a split."""
        return [member.patient_id for member in self.splits[split]]

    def cards(self) -> dict[str, SplitCard]:
        """Returns what identifies the patients of each split."""
        cards = {}
        for name, members in self.splits.items():
            rows = sorted((member.patient_id, member.label, member.params_hash) for member in members)
            digest = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()[:16]
            by_class = dict(zip(self.classes, self.counts(name), strict=True))
            cards[name] = SplitCard(len(members), by_class, digest)
        return cards


def read_training_set(
    table_uri: str,
    version: int | None,
    *,
    encoder: str | None = None,
    fold: int | None = None,
    splits_uri: str = "",
    splits_version: int | None = None,
    storage_options: StorageOptions | None = None,
) -> TrainingSet:
    """Returns the labelled patients with a bag of an encoder in a version of table patients, by its column split.

    With a fold of table splits, the model is validated on this fold and trained on the others. Split test stays the same.
    If `encoder` is None, it is the only one of that version. Versions are the newest if None.

    Raises:
        FeedError: the table, the version or the encoder is missing, or the version is not whole or has several encoders.
        CohortError: the splits cannot be trained on.
    """
    table = pin_table(table_uri, version, storage_options)
    encoder = table.encoder_of_bags(encoder)
    where = f"{table.name}, encoder {encoder},"
    if "split" not in table.columns:
        raise CohortError(f"{where} has no column split: run the splits job first")
    splits: dict[str, list[Member]] = {name: [] for name in SPLITS}
    rows = [row for row in table.rows.to_pylist() if row["encoder"] == encoder]
    assigned = [row for row in rows if row["split"] is not None]
    labelled = [row for row in assigned if row["label"] is not None]
    if unknown := {row["split"] for row in assigned} - splits.keys():
        raise CohortError(f"{where} has a split {min(unknown)!r}: splits are {', '.join(SPLITS)}")
    for row in sorted(labelled, key=lambda row: row["patient_id"]):
        names = [field.name for field in fields(Member)]
        splits[row["split"]].append(Member(**{name: row[name] or "" for name in names}))
    if fold is not None:
        splits_version = _by_fold(splits, fold, splits_uri, splits_version, storage_options)
    dims = {int(row["embedding_dim"]) for row in labelled}
    if len(dims) > 1:
        raise CohortError(f"{where} has embeddings of {sorted(dims)} columns: run the main job again")
    unlabelled, unassigned = len(assigned) - len(labelled), len(rows) - len(assigned)
    dim = max(dims, default=0)
    found = TrainingSet(table_uri, table.version, encoder, splits, unlabelled, unassigned, dim, splits_version)
    _check_labels(found, where)
    return found


def _check_labels(found: TrainingSet, where: str) -> None:
    labels = {member.label for members in found.splits.values() for member in members}
    wrong = [[label] for label in sorted(labels) if is_no_value(label)] + twins(labels)
    if wrong:
        texts = [" and ".join(map(quoted, group)) for group in wrong]
        raise CohortError(
            f"{where} has labels that the CSV may not have: {some(texts, separator='; ')}: correct column label of the CSV, "
            "and run the main job again"
        )
    reserved = sorted(label for label in labels if label.casefold() in {*SUBMISSION_COLUMNS, *HELD_OUT_COLUMNS})
    if reserved:
        raise CohortError(
            f"{where} has labels {some(list(map(quoted, reserved)))}, which name other columns of the CSVs of predictions: "
            "rename them in column label of your CSV, and run the main job again"
        )
    if len(labels) < 2:
        raise CohortError(
            f"split train of {where} has {len(found.splits['train'])} labelled patients of {len(found.classes)} classes: "
            "two classes at least are needed; give the CSV its column label, and run the splits job"
        )
    if refused := found.class_gaps().refused:
        raise CohortError(
            f"{where} cannot be learned from: {'; '.join(refused)}: deal anew by the splits job with --redo and another "
            "splits.seed or other shares, or take classes of too few patients out of the CSV"
        )


def _by_fold(
    splits: dict[str, list[Member]], fold: int, uri: str, version: int | None, storage_options: StorageOptions | None
) -> int:
    """Deals train and validation by the folds of table splits; returns the version of that table."""
    try:
        found, rows = read_columns(uri, ("patient_id", "fold"), version, storage_options)
    except NoTableError:
        raise CohortError(f"no table splits at {public_uri(uri)}: set splits.folds and run the splits job") from None
    fold_of = {row["patient_id"]: row["fold"] for row in rows.to_pylist()}
    members = sorted(splits["train"] + splits["validation"], key=lambda member: member.patient_id)
    without = [member.patient_id for member in members if fold_of.get(member.patient_id) is None]
    if without or fold not in fold_of.values():
        existing = sorted({number for number in fold_of.values() if number is not None})
        raise CohortError(
            f"training.fold is {fold}, table splits has folds {existing} and {len(without)} patients without one: set "
            "splits.folds and run the splits job"
        )
    splits["validation"] = [member for member in members if fold_of[member.patient_id] == fold]
    splits["train"] = [member for member in members if fold_of[member.patient_id] != fold]
    return found
