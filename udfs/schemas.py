"""The columns of the tables, with type, unit, frame and meaning, in one place for UDFs, Delta and readers.

All are Arrow schemas. The metadata of a field carries the comment of the Delta column. Fields are nullable unless they are
keys or always known.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from udfs.wsi.quality.mask_metric import MaskMetric
from udfs.wsi.quality.metric import Metric
from udfs.wsi.quality.pixel_metric import PixelMetric

_STRING, _BINARY, _BOOL = pa.string(), pa.binary(), pa.bool_()
_INT, _LONG, _DOUBLE, _FLOAT = pa.int32(), pa.int64(), pa.float64(), pa.float32()
_VECTOR, _TEXTS, _COUNTS = pa.list_(_FLOAT), pa.map_(_STRING, _STRING), pa.map_(_STRING, _LONG)


def _column(name: str, kind: pa.DataType, comment: str, *, required: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=not required, metadata={"comment": comment})


def _metric_column(metric: Metric) -> pa.Field:
    return _column(metric.column, pa.type_for_alias(metric.type), metric.comment)


def _schema(*fields: pa.Field) -> pa.Schema:
    return pa.schema(fields)


_PROVENANCE = [
    _column("params_hash", _STRING, "hash of every setting, weight file, input and code version that shapes this row"),
    _column("run_id", _STRING, "the run that wrote this row, see table runs"),
]
_IMAGE = _column("image_id", _STRING, "the slide image, from the patient CSV", required=True)
_X = _column("x_px", _INT, "left edge of the tile, level-0 pixels from the slide's left edge", required=True)
_Y = _column("y_px", _INT, "top edge of the tile, level-0 pixels from the slide's top edge", required=True)
_ENCODER = _column(
    "encoder", _STRING, "the encoder of the vectors, by its name in the settings (section encoders)", required=True
)
_PATIENT = _column("patient_id", _STRING, "the patient, from the patient CSV", required=True)
_CENTER = _column("center_id", _STRING, "the centre that treated the patient, from the CSV")
_LABEL = _column("label", _STRING, "the patient's diagnosis from the CSV; null if the CSV has none")
_SPLIT = _column("split", _STRING, "train, validation or test, from table splits; null until the job splits ran")

SLIDES = _schema(
    _IMAGE,
    _PATIENT,
    _CENTER,
    _column("image_num", _INT, "number of the image among those of the patient, from the CSV"),
    _LABEL,
    _column("uri", _STRING, "where the slide was read from, without user, password or query"),
    _column("size_bytes", _LONG, "size of the file, bytes"),
    _column("file_version", _STRING, "the store's etag, else size and mtime: changes when the file does"),
    _column("vendor", _STRING, "scanner vendor, from the header"),
    _column("width_px", _INT, "width of the slide, level-0 pixels"),
    _column("height_px", _INT, "height of the slide, level-0 pixels"),
    _column("mpp_x", _DOUBLE, "micrometres per level-0 pixel along x, by CSV or header; null if unknown"),
    _column("mpp_y", _DOUBLE, "micrometres per level-0 pixel along y, by CSV or header; null if unknown"),
    _column("level_downsamples", pa.list_(_DOUBLE), "level-0 pixels per pixel of each level, level 0 first"),
    _column("status", _STRING, "ok; no_tissue: no tile has enough tissue; too_small: no tile fits; or failed"),
    _column("error_code", _STRING, "why the slide failed, a short code; null if it did not fail"),
    _column("error_message", _STRING, "why the slide failed or is too small, and what to do"),
    _column("warnings", pa.list_(_STRING), "what to know about a slide that was read; null if nothing"),
    _column("n_tiles", _INT, "tiles with enough tissue, the rows of table tiles"),
    _column("tissue_fraction", _DOUBLE, "share of the mask that is not background, 0 to 1; null if it has no pixel"),
    *_PROVENANCE,
)

_MASK_METRICS = [_metric_column(metric) for metric in MaskMetric.defined()]

TILES = _schema(
    _IMAGE,
    _X,
    _Y,
    _PATIENT,
    _column("tile_px", _INT, "edge of the finished tile, pixels of the target resolution"),
    _column("level_read", _INT, "index of the level that the tile is read from, 0 the finest"),
    _column("downsample", _DOUBLE, "level-0 pixels per pixel of the finished tile, along an edge"),
    *_MASK_METRICS,
    *_PROVENANCE,
)

INDEXES = _schema(
    _IMAGE,
    _column("size_bytes", _LONG, "size of the file that was indexed, bytes"),
    _column("file_version", _STRING, "the version of that file, as in slides"),
    _column("index", _BINARY, "the levels and where their blocks lie, to read tiles without the header"),
    *_PROVENANCE,
)

HISTOGRAM = pa.struct({"bin": pa.list_(_INT), "count": pa.list_(_INT)})

FEATURES = _schema(
    _IMAGE,
    _X,
    _Y,
    _ENCODER,
    _PATIENT,
    _column("embedding", _VECTOR, "the encoder's vector: mean of its feature map, or its published pooling, [dim]"),
    _column(
        "embedding_max", _VECTOR, "maximum of the encoder's feature map, [dim]; null if the encoder gives one vector"
    ),
    _column(
        "color_histogram",
        HISTOGRAM,
        "pixels of the stain-normalised tile by colour, only bins that are not empty: bin ascending "
        "(r>>4)<<8 | (g>>4)<<4 | b>>4 for 16 bins per channel, count in pixels; counts sum to tile_px squared",
    ),
    *map(_metric_column, PixelMetric.defined()),
    *_PROVENANCE,
)

TILE_INDEX = pa.list_(pa.struct({"image_id": _STRING, "x_px": _INT, "y_px": _INT}))

PATIENTS = _schema(
    _PATIENT,
    _ENCODER,
    _CENTER,
    _LABEL,
    _SPLIT,
    _column("n_images", _INT, "slides of the patient in the CSV"),
    _column("n_images_failed", _INT, "those among them that failed, see table slides"),
    _column("n_images_without_tiles", _INT, "those among them with status no_tissue or too_small in table slides"),
    _column("n_tiles", _INT, "rows of the bag"),
    _column("complete", _BOOL, "true if every slide of the patient has status ok: none failed, none is without tiles"),
    _column("embedding_dim", _INT, "columns of the bag"),
    _column(
        "embedding_dtype", _STRING, "float32 or float16, little-endian; null is float32, in rows of older versions"
    ),
    _column(
        "embeddings",
        _BINARY,
        "embedding of all tiles: little-endian embedding_dtype, C order, [n_tiles, embedding_dim], by image_id, y_px, x_px",
    ),
    _column(
        "embeddings_max", _BINARY, "embedding_max of all tiles, as embeddings; null if the encoder gives one vector"
    ),
    _column("tile_index", TILE_INDEX, "which tile each row of the bags is; x_px, y_px in level-0 pixels"),
    _column(
        "color_histogram", _VECTOR, "mean over tiles of the share of pixels per colour bin, as in features; sums to 1"
    ),
    *_PROVENANCE,
)

_VECTOR_COLUMNS = [
    _column("n_tiles", _INT, "tiles that the vector is made of"),
    _column("vector", _VECTOR, "what the aggregator makes of the embeddings of these tiles"),
    *_PROVENANCE,
]
_AGGREGATOR = _column(
    "aggregator",
    _STRING,
    "what made one vector of many, by its name in the settings (section aggregators)",
    required=True,
)

SLIDE_VECTORS = _schema(_IMAGE, _ENCODER, _AGGREGATOR, _PATIENT, *_VECTOR_COLUMNS)
PATIENT_VECTORS = _schema(_PATIENT, _ENCODER, _AGGREGATOR, *_VECTOR_COLUMNS)

SPLITS = _schema(
    _PATIENT,
    _column("split", _STRING, "train, validation or test: a patient keeps it, whatever is added", required=True),
    _column("fold", _INT, "fold of splits.folds, from 0; null in test, and if no folds are set"),
    _CENTER,
    _LABEL,
    _column("n_images", _INT, "slides of the patient in the CSV, by which patients are weighed"),
    _column("seed", _LONG, "splits.seed that the patient was dealt with"),
    *_PROVENANCE,
)

_ATTENTION = pa.list_(pa.struct({"image_id": _STRING, "x_px": _INT, "y_px": _INT, "attention": _FLOAT}))

PREDICTIONS = _schema(
    _PATIENT,
    _column("model_id", _STRING, "the model, by the run that trained it", required=True),
    _column("encoder", _STRING, "the encoder whose bags the model takes"),
    _column("probabilities", pa.map_(_STRING, _DOUBLE), "probability by class; they sum to 1"),
    _column("predicted_class", _STRING, "the most probable class; null if from_prior"),
    _column(
        "from_prior",
        _BOOL,
        "true if the patient has no bag, because there is no tile or more than a row can hold: the probabilities are the "
        "classes' shares among the training patients",
    ),
    _column("n_tiles", _INT, "tiles that the model saw"),
    _column("n_images_failed", _INT, "slides of the patient in the CSV that the model did not see, see table slides"),
    _column("n_images_without_tiles", _INT, "slides of the patient with status no_tissue or too_small in table slides"),
    _column(
        "attention",
        _ATTENTION,
        "weight of each tile, in the order of patients; sums to 1; x_px, y_px in level-0 pixels",
    ),
    *_PROVENANCE,
)

TRAINING_METRICS = _schema(
    _column("run_id", _STRING, "the training run, which is the model's model_id too", required=True),
    _column("epoch", _INT, "pass over split train, from 0", required=True),
    _column("split", _STRING, "train or validation in each epoch; test once, in the best epoch and by its weights"),
    _column("name", _STRING, "what was measured: loss (as it is minimised), auroc, log_loss, weighted_log_loss, ..."),
    _column("value", _DOUBLE, "its value; null if it has none, such as AUROC of one class"),
)

_READING = {"requests": _LONG, "bytes_read": _LONG, "seconds_waited": _DOUBLE}
_READS = pa.list_(pa.struct({"image_id": _STRING, "stage": _STRING, "size_bytes": _LONG} | _READING))
_WORK_OF_STAGE = pa.map_(_STRING, pa.struct(_READING | {"seconds_decoding": _DOUBLE, "seconds_encoding": _DOUBLE}))

RUNS = _schema(
    _column("run_id", _STRING, "the run", required=True),
    _column("job", _STRING, "the job that ran"),
    _column("status", _STRING, "done, or the error that ended it"),
    _column("started_at", pa.timestamp("us", "UTC"), "start of the run"),
    _column("finished_at", pa.timestamp("us", "UTC"), "end of the run"),
    _column("config", _STRING, "the resolved settings as JSON, secrets masked"),
    _column("versions", _TEXTS, "versions of slidelake, Spark and what shapes results; encoder: runtime and precision"),
    _column(
        "features",
        pa.map_(_STRING, _TEXTS),
        "what shapes features, by encoder: settings, hashes of weights, code versions; and the licence, revision and SHA-256 of "
        "the weights if known; empty if not needed",
    ),
    _column("tables_read", _COUNTS, "Delta version of each table of the job when the run began"),
    _column("tables_written", _COUNTS, "Delta version of each table that the run changed"),
    _column("counts", _COUNTS, "slides, tiles and patients, by what became of them"),
    _column("timings", pa.map_(_STRING, _DOUBLE), "seconds by stage"),
    _column(
        "reads",
        _READS,
        "cost of reading each slide in stage slides or features: size of its file and bytes read of it, requests to the "
        "store, seconds that workers waited for bytes; without attempts that died or never opened the file",
    ),
    _column(
        "work",
        _WORK_OF_STAGE,
        "what all workers together did in stage slides or features: requests to the store, bytes read, seconds by the "
        "clock that they waited for bytes, made tiles or masks of them, and encoded tiles; as in reads, without attempts "
        "that died",
    ),
)


@dataclass(frozen=True)
class Table:
    """A Delta table below output.root."""

    name: str
    schema: pa.Schema
    comment: str  # for catalogs
    layout: Mapping[str, str] = field(default_factory=dict)  # its own properties of Delta and Parquet
    if_deleted: str = "the same command makes its rows anew"  # what becomes of rows whose files are lost


# Training reads a row group at a time: small ones make small steps. As properties of the table these hold for every writer,
# with any settings of Spark.
_ROW_GROUPS = {"parquet.block.size": str(32 << 20)}
# Delta's smallest and largest of each column cost more than all else about writing a tile, so they are kept only for columns
# by which a stage looks for its rows.
_STATISTICS = {"delta.dataSkippingStatsColumns": "image_id,patient_id"}
_OF_PATIENTS = {"delta.dataSkippingStatsColumns": "patient_id"}
_BAGS = {
    # Parquet looks at the size of a row group after 100 rows at the soonest, which bags fill many times over.
    "parquet.page.size.row.check.min": "1",
    # The smallest and largest bag of each row group would stay in memory until the file ends, and are of no use.
    "parquet.column.statistics.enabled#embeddings": "false",
    "parquet.column.statistics.enabled#embeddings_max": "false",
}

_TABLES = [
    Table("slides", SLIDES, "One row per image of the CSV: header, um/px, status, error, tiles, tissue fraction"),
    Table("tiles", TILES, "One row per tile with enough tissue: its place, the level that is read", _STATISTICS),
    Table("indexes", INDEXES, "One row per slide that was read: where its compressed blocks lie"),
    Table("features", FEATURES, "One row per tile and encoder: vectors, colour histogram", _ROW_GROUPS | _STATISTICS),
    Table("patients", PATIENTS, "One row per patient with tiles and encoder: bag, label, split", _ROW_GROUPS | _BAGS),
    Table(
        "slide_vectors", SLIDE_VECTORS, "One row per slide with tiles, encoder and aggregator: one vector", _STATISTICS
    ),
    Table(
        "patient_vectors",
        PATIENT_VECTORS,
        "One row per patient with tiles, encoder and aggregator: one vector",
        _OF_PATIENTS,
    ),
    Table(
        "splits",
        SPLITS,
        "One row per patient with a split: split, fold, number of images, seed",
        if_deleted="its patients are dealt anew",
    ),
    Table("predictions", PREDICTIONS, "One row per patient and model: probability by class, attention of each tile"),
    Table(
        "runs",
        RUNS,
        "One row per run: settings without secrets, versions, tables read and written, counts, seconds",
        if_deleted="the record of earlier runs is lost",
    ),
]
TABLES = {table.name: table for table in _TABLES}

# What the passes hand on, on the way to the tables.

# Seconds by the clock of the thread that reads or encodes. If these are two threads, they run at once.
WORK = pa.struct(
    [
        pa.field("requests", _LONG),
        pa.field("bytes", _LONG),  # received
        pa.field("waited_s", _DOUBLE),  # for bytes
        pa.field("decoded_s", _DOUBLE),  # blocks to finished tiles or to the mask: all of reading but waiting
        pa.field("encoded_s", _DOUBLE),  # tiles to embeddings and histograms
    ]
)

PER_TILE = [
    "x_px",
    "y_px",
    *(metric.name for metric in _MASK_METRICS),
]  # columns of tiles that are lists in FOUND_TISSUE

FOUND_TISSUE = _schema(
    *SLIDES,
    *(pa.field(name, pa.list_(TILES.field(name).type)) for name in PER_TILE),
    pa.field("level_read", _INT),
    pa.field("downsample", _DOUBLE),
    pa.field("index", _BINARY),  # null if the slide failed or if OpenSlide reads it
    pa.field("work", WORK),  # null if the slide did not open
)

# Of a tile: the encoders that embed it, and the params_hash of each one's row.
ENCODERS = pa.list_(pa.struct([pa.field("encoder", _STRING), pa.field("params_hash", _STRING)]))

# A work unit: some tiles of one slide that the same encoders embed, and how to read them.
UNITS = _schema(
    _IMAGE,
    pa.field("unit", _INT),  # number among the units of the slide
    _PATIENT,
    pa.field("uri", _STRING),  # as it is opened: may hold secrets, so it is in no table
    pa.field("encoders", ENCODERS),
    pa.field("tile_px", _INT),
    pa.field("level_read", _INT),
    pa.field("downsample", _DOUBLE),
    pa.field("x_px", pa.list_(_INT)),  # level-0 pixels, in the order of reading
    pa.field("y_px", pa.list_(_INT)),
    pa.field("index", _BINARY),  # of just the blocks under these tiles; null: the header is read
    pa.field("n_tiles", _INT),
    pa.field("n_bytes", _LONG),  # compressed, of those blocks; null if unknown
    pa.field("cost", _DOUBLE),  # relative to other units
)

# A row per tile and encoder, and after those of each unit one row on how the unit went: the columns of tiles null, tiles
# encoded, the error if there was one, and size of the file and work if it was opened.
ENCODED = _schema(
    *(column.with_nullable(True) for column in FEATURES),
    pa.field("n_tiles", _INT),
    pa.field("error_code", _STRING),
    pa.field("error_message", _STRING),
    pa.field("size_bytes", _LONG),
    pa.field("work", WORK),
)
