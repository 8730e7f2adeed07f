"""Table splits, column split of patients, and one CSV per split: who is in train, validation and test.

Patients are dealt to train, validation and test by their number of images, within centre and label, all images of a patient
together, in an order that depends on splits.seed and not on the CSV. A patient keeps its split: if the CSV gains patients,
run the job again to deal them alone. One slide under two names in two splits is refused. The shares hold over the cohort,
and in each centre and label as far as whole patients allow, so a split may lack patients of a small centre. The job warns of
splits that lack a class or are empty. If other settings dealt the patients, --redo deals all of them anew.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import product
from typing import Any

from jobs.runtime.cohort.patient_csv import Image, rows_as_written
from jobs.runtime.run.cli import DONE
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import Job, Run
from jobs.runtime.run.summary import end_lines
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.settings.identity import row_hash, settings_of
from jobs.runtime.tables.tables import spark_schema
from jobs.training.leakage import Compared, LeakageError, SlideFile, refuse_leaks
from jobs.training.splitting import SPLITS, VERSION, Patient, assign_folds, assign_splits, missing_classes
from udfs import schemas
from udfs.wording import named
from udfs.wsi.store import public_uri, read_bytes, write_bytes

JOB = Job("splits", reads=("slides",), writes=("splits", "patients"))  # patients only if it exists
_PROPERTY = "slidelake.splits"  # of table splits: the settings that its patients were dealt with
_MAY_CHANGE = ("split", "fold", "center_id", "label", "n_images", "seed", "params_hash", "run_id")
Row = dict[str, Any]  # of table splits


def split(run: Run, arguments: argparse.Namespace) -> int:
    """Assigns splits to patients without one, then brings tables and files up to date. Returns the exit status."""
    images = run.images
    with run.progress.stage("splits"):
        have: dict[str, Row] = {row.patient_id: row.asDict() for row in run.tables.read("splits").collect()}
        anew = _is_dealt_anew(run, have, redo=arguments.redo)
        rows = _deal(run, images, have, {} if anew else have)
        compared = _gate(run, images, rows)
        _write(run, rows, have, anew=anew)
    with run.progress.stage("patients"):
        shown = _show_in_patients(run, rows) if run.tables.exists("patients") else None
    with run.progress.stage("csv"):
        files = _write_csvs(run, run.cohort.csv, rows)
    moved = sum(have[name]["split"] != row["split"] for name, row in rows.items() if name in have)
    run.record.counts.update(
        patients=len(rows), patients_dealt=len(rows if anew else rows.keys() - have.keys()), patients_moved=moved
    )
    run.record.counts.update(Counter(f"patients_{row['split']}" for row in rows.values()))
    print(_report(run, rows, compared, shown, files))
    return DONE


def _dealing_settings(run: Run) -> Row:
    """Returns the settings that decide the split of a patient. Folds are dealt within the splits."""
    settings = settings_of(run.config, "splits").items()
    return {key.removeprefix("splits."): value for key, value in settings if key != "splits.folds"}


def _is_dealt_anew(run: Run, have: Mapping[str, Row], *, redo: bool) -> bool:
    """Returns whether other settings dealt the patients who have a split, so that --redo deals them anew.

    Raises:
        ConfigError: other settings dealt them, and --redo was not given.
    """
    was = json.loads(run.tables.property("splits", _PROPERTY) or "{}") if have else {}
    differ = [
        f"splits.{name} is {now}, it was {was[name]}"
        for name, now in _dealing_settings(run).items()
        if was.get(name, now) != now
    ]
    if differ and not redo:
        raise ConfigError(
            f"{'; '.join(differ)} when the {len(have)} patients of {public_uri(run.tables.path('splits'))} were dealt, and a "
            "patient keeps its split, so that none of test is ever trained on: set it back; or give --redo to deal all patients "
            "anew, and train all models again"
        )
    return bool(differ)


def _deal(run: Run, images: Sequence[Image], have: Mapping[str, Row], kept: Mapping[str, Row]) -> dict[str, Row]:
    """Returns the rows of table splits by patient_id, also of patients who left the CSV.

    `have`: rows now; `kept`: rows of patients who keep their split.
    """
    settings = run.config.splits
    known = {row["patient_id"]: Patient(*(row[field.name] for field in fields(Patient))) for row in have.values()}
    n_images = Counter(image.patient_id for image in images)
    today = {i.patient_id: Patient(i.patient_id, i.center_id, i.label, n_images[i.patient_id]) for i in images}
    patients = list((known | today).values())
    how: dict[str, Any] = {"stratify": settings.stratify, "seed": settings.seed}
    fractions = {name: getattr(settings, name) for name in SPLITS}
    split_of = assign_splits(patients, fractions, {name: row["split"] for name, row in kept.items()}, **how)
    params_hash = row_hash(VERSION, settings_of(run.config, "splits"))
    fold_of: dict[str, int] = {}
    if settings.folds:
        # Folds may be dealt anew: the test split stays out of all of them. They stay under the same settings.
        same_settings = {name: row for name, row in kept.items() if row["params_hash"] == params_hash}
        fixed = {name: row["fold"] for name, row in same_settings.items() if row["fold"] is not None}
        learned_from = [patient for patient in patients if split_of[patient.patient_id] != "test"]
        fold_of = assign_folds(learned_from, settings.folds, fixed, **how)
    rows: dict[str, Row] = {}
    for patient in sorted(patients, key=lambda patient: patient.patient_id):
        name = patient.patient_id
        row = vars(patient) | {"split": split_of[name], "fold": fold_of.get(name), "seed": settings.seed}
        was = have.get(name, {})
        stays = name in kept and was["fold"] is None and row["fold"] is None  # a fold is of the settings of today
        row["params_hash"] = was["params_hash"] if stays else params_hash
        same = was and all(was[field] == value for field, value in row.items())
        rows[name] = row | {"run_id": was["run_id"] if same else run.record.run_id}
    return rows


def _gate(run: Run, images: Sequence[Image], rows: Mapping[str, Row]) -> Compared | None:
    """Refuses leaks across splits and across folds. Returns None if there is no table slides to compare the files of."""
    slides: list[SlideFile] = []
    if run.tables.exists("slides"):
        # These may hold a signature that the table does not have.
        uri_of = {image.image_id: image.uri for image in images if image.uri}
        found = run.tables.read("slides").select([field.name for field in fields(SlideFile)]).dropna().collect()
        slides = [SlideFile(**row.asDict() | {"uri": uri_of.get(row.image_id, row.uri)}) for row in found]
    options = run.config.slides.storage_options
    try:
        compared = refuse_leaks([(name, row["split"]) for name, row in rows.items()], slides, options)
        if run.config.splits.folds:
            by_fold = [row["split"] if row["fold"] is None else str(row["fold"]) for row in rows.values()]
            refuse_leaks(zip(rows, by_fold, strict=True), slides, options)
    except LeakageError as error:
        raise ConfigError(str(error)) from None
    return compared if run.tables.exists("slides") else None


def _write(run: Run, rows: Mapping[str, Row], have: Mapping[str, Row], *, anew: bool) -> None:
    """Writes new rows in one commit and changed ones in another, if there are any.

    The settings are noted before the first rows; if patients are dealt anew, after the rows, so that a killed run deals again.
    """
    run.tables.create("splits")
    if not anew:
        _note_settings(run)
    schema = spark_schema(schemas.SPLITS)
    values = {name: tuple(row[column] for column in schema.names) for name, row in rows.items()}
    new = [values[name] for name in rows if name not in have]
    changed = [values[name] for name, row in rows.items() if name in have and row != have[name]]
    if changed:
        run.tables.upsert("splits", run.spark.createDataFrame(changed, schema), "patient_id", _MAY_CHANGE)
    if new:
        run.tables.append("splits", run.spark.createDataFrame(new, schema).coalesce(1))
    if anew:
        _note_settings(run)


def _note_settings(run: Run) -> None:
    settings = json.dumps(_dealing_settings(run))
    if run.tables.property("splits", _PROPERTY) != settings:
        run.tables.set_property("splits", _PROPERTY, settings)


def _show_in_patients(run: Run, rows: Mapping[str, Row]) -> int:
    """Updates column split of patients; returns the number of changed rows."""
    run.tables.create("patients")  # one of an older version lacks the column
    now = run.tables.read("patients").select("patient_id", "split").collect()
    splits = [(row.patient_id, row.split, rows[row.patient_id]["split"]) for row in now if row.patient_id in rows]
    wrong = [(name, part) for name, shown, part in splits if shown != part]
    if wrong:  # several rows of a patient, one per encoder, are changed by one
        frame = run.spark.createDataFrame(sorted(set(wrong)), "patient_id string, split string")
        run.tables.upsert("patients", frame, "patient_id", ["split"])
    return len(wrong)


def _write_csvs(run: Run, data: bytes, rows: Mapping[str, Row]) -> list[str]:
    """Writes one file per split, and two per fold: header and rows of the CSV, byte for byte. Returns their URIs."""
    settings = run.config.splits
    folder = (settings.csv or f"{run.config.output.root.rstrip('/')}/splits_csv").rstrip("/")
    header, lines = rows_as_written(data)
    files = {f"{name}.csv": [line for patient, line in lines if rows[patient]["split"] == name] for name in SPLITS}
    for fold in range(settings.folds or 0):
        of_folds = [(rows[patient]["fold"], line) for patient, line in lines if rows[patient]["fold"] is not None]
        files[f"fold_{fold}_train.csv"] = [line for number, line in of_folds if number != fold]
        files[f"fold_{fold}_validation.csv"] = [line for number, line in of_folds if number == fold]
    options = run.config.slides.storage_options
    for name, of_file in files.items():
        uri, content = f"{folder}/{name}", b"".join([header, *of_file])
        try:
            is_same = read_bytes(uri, options) == content
        except FileNotFoundError:
            is_same = False
        if not is_same:
            write_bytes(uri, content, options)
    return [f"{folder}/{name}" for name in files]


def _report(
    run: Run, rows: Mapping[str, Row], compared: Compared | None, shown: int | None, files: Sequence[str]
) -> str:
    lines = ["", f"slidelake splits, run {run.record.run_id}", *counts_table(rows.values())]
    wanted = " / ".join(f"{getattr(run.config.splits, name):.1%}" for name in SPLITS)
    dealt, moved = run.record.counts["patients_dealt"], run.record.counts["patients_moved"]
    lines.append(
        f"  requested {wanted}, seed {run.config.splits.seed}; {dealt} patients dealt, {len(rows) - dealt} kept their split"
    )
    if moved:
        lines.append(
            f"  redo      {moved} patients moved to another split: train all models again, since an older model may have "
            "learned from patients of the new test split"
        )
    lines += [f"  WARNING   {warning}" for warning in _warnings(run, rows.values())]
    if compared is None:
        lines.append(
            "  leakage   there is no table slides: no file was compared; run the slides job, then this job again"
        )
    else:
        unread = f", {compared.unreadable} more could not be opened" if compared.unreadable else ""
        lines.append(
            f"  leakage   none among {compared.images:,} slides by URI, size and etag, and by content where sizes are equal "
            f"({compared.opened} opened{unread})"
        )
    if shown is None:
        lines.append("  patients  no table yet: the patients job fills its column split")
    else:
        lines.append(f"  patients  column split, {shown} rows changed")
    lines += end_lines(run.record, public_uri(run.config.output.root))
    lines.append(f"  csv       {', '.join(public_uri(uri) for uri in files)}")
    return "\n".join(lines)


def _warnings(run: Run, rows: Collection[Row]) -> list[str]:
    """Returns lines on splits and folds that train refuses, classes that a split lacks, and empty splits."""
    settings = run.config.splits
    labels = {name: [row["label"] for row in rows if row["split"] == name] for name in SPLITS}
    gaps = missing_classes(labels)
    remedy = "add patients, or deal anew with --redo and another splits.seed or other shares"
    warnings = []
    if gaps.refused:
        warnings.append(f"train refuses these splits: {'; '.join(gaps.refused)}: {remedy}")
    if gaps.lacking:
        warnings.append(f"{'; '.join(gaps.lacking)}: the figures of a split leave out the classes that it lacks")
    for name in SPLITS[1:]:
        share, n_labelled = getattr(settings, name), sum(label is not None for label in labels[name])
        if share > 0 and not n_labelled:
            warnings.append(f"split {name} has 0 labelled patients, and splits.{name} is {share}: {remedy}")
    for fold in range(settings.folds or 0):
        of_folds = [(row["fold"], row["label"]) for row in rows if row["fold"] is not None]
        train = [label for number, label in of_folds if number != fold]
        validation = [label for number, label in of_folds if number == fold]
        if refused := missing_classes(labels | {"train": train, "validation": validation}).refused:
            reason = "; ".join(refused)
            warnings.append(f"training.fold={fold} is refused: {reason}: add patients, or lower splits.folds")
    return warnings


def counts_table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns lines with patients and images by centre, label and split; rows are those of table splits."""
    patients: Counter[tuple[str, str, str]] = Counter()
    images: Counter[tuple[str, str, str]] = Counter()
    labels: dict[str, set[str]] = defaultdict(set)  # "" stands for all
    for row in rows:
        for center, label in product((named(row["center_id"]), ""), (named(row["label"] or "-"), "")):
            labels[center].add(label)
            patients[center, label, row["split"]] += 1
            images[center, label, row["split"]] += row["n_images"]
    lines: list[tuple[str, ...]] = [
        ("", "", "patients", "", "", "images", "", "", "of images", "", ""),
        ("centre", "label", *SPLITS * 3),
    ]
    for center in [*sorted(labels.keys() - {""}), ""]:
        of_center = sorted(labels[center] - {""})
        for label in of_center if len(of_center) == 1 and center else [*of_center, ""]:
            n_images = [images[center, label, name] for name in SPLITS]
            counts = [*(patients[center, label, name] for name in SPLITS), *n_images]
            shares = [f"{count / max(1, sum(n_images)):.1%}" for count in n_images]
            lines.append((center or "all", label or "all", *map(str, counts), *shares))
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return [
        f"  {center:<{widths[0]}}  {label:<{widths[1]}}  " + "  ".join(f"{cell:>10}" for cell in cells)
        for center, label, *cells in lines
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, split, argv)


if __name__ == "__main__":
    sys.exit(main())
