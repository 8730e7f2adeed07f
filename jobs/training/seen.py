"""Finds patients to be predicted that a model learned from: by patient_id in the same tables, else by their slides."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jobs.training.leakage import Compared, shared_slides, slide_files
from jobs.training.model.files import ModelCard
from jobs.training.refusals import FeedError
from jobs.training.table_versions import read_columns
from udfs.wording import some
from udfs.wsi.store import StorageOptions, absolute_uri, public_uri, redact, secrets_of

_LEARNED_FROM = ("train", "validation")  # validation chose the epoch
_NEW, _LEARNED = "new", "learned from"


@dataclass(frozen=True)
class Seen:
    """The patients and slides to be predicted that a model learned from."""

    patients: list[str]  # in these tables
    copies: list[str]  # one line per file that is a slide of a new patient and one that the model learned from
    compared: Compared | None  # None if the slides that the model learned from are unknown
    reason: str = ""  # for that

    def lines(self) -> list[str]:
        """Returns lines for the summary of a run; none if nothing was seen."""
        lines = []
        if self.patients:
            lines.append(f"{len(self.patients)} patients that the model learned from: {some(self.patients, 10)}")
        if self.copies:
            lines.append(f"{len(self.copies)} slides that the model learned from: {some(self.copies, 10, '; ')}")
        if lines:
            lines[-1] += ": do not judge the model by them"
        if self.compared is None:
            lines.append(f"slides were not compared with those that the model learned from: {self.reason}")
        elif self.compared.unreadable:
            lines.append(f"{self.compared.unreadable} slides of equal size could not be opened, so not be compared")
        return [f"  {'seen' if i == 0 else '':<10}{line}" for i, line in enumerate(lines)]


def seen_by_model(
    card: ModelCard, root: str, images: Mapping[str, str | None], storage_options: StorageOptions | None = None
) -> Seen:
    """Compares the slides to be predicted with those of the model's splits train and validation.

    `root` is that of the tables that are predicted on. `images` has the URI that opens each slide to be predicted, by image_id;
    None for that of table slides.
    """
    try:
        return _compared(card, absolute_uri(root).rstrip("/"), images, storage_options)
    except Exception as error:  # the predictions are written, so no error may end the run
        secrets = {secret for uri in (root, *images.values()) for secret in secrets_of(uri, storage_options)}
        text = str(error) if isinstance(error, FeedError) else f"{type(error).__name__}: {error}"
        return Seen([], [], None, redact(" ".join(text.split()), sorted(secrets, key=len, reverse=True)))


def _compared(
    card: ModelCard, root: str, images: Mapping[str, str | None], storage_options: StorageOptions | None
) -> Seen:
    own = slide_files(f"{root}/slides", storage_options)
    files = [replace(file, uri=images[file.image_id] or file.uri) for file in own if file.image_id in images]
    learned = _learned_from(card, storage_options)
    trained_on = card.table_uri.rpartition("/")[0]
    is_same = trained_on == public_uri(root)
    training = own if is_same else slide_files(f"{trained_on}/slides", storage_options)
    here: set[str] = learned if is_same else set()
    new = [(file, _NEW) for file in files if file.patient_id not in here]
    known = [(file, _LEARNED) for file in training if file.patient_id in learned]
    copies, compared = shared_slides([*new, *known], storage_options)
    return Seen(sorted({file.patient_id for file in files} & here), copies, compared)


def _learned_from(card: ModelCard, storage_options: StorageOptions | None) -> set[str]:
    """Returns the patients of train and validation."""
    columns, of_encoder = ("patient_id", "split", "label"), ("encoder", [card.encoder])
    try:
        _, rows = read_columns(card.table_uri, columns, card.table_version, storage_options, of_encoder)
    except FeedError:  # gone; the newest version has them too, since a patient keeps its split
        _, rows = read_columns(card.table_uri, columns, None, storage_options)
    return {row["patient_id"] for row in rows.to_pylist() if row["split"] in _LEARNED_FROM and row["label"] is not None}
