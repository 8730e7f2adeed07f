"""Tables slide_vectors and patient_vectors: one vector per slide and per patient, made of the tiles in table features.

Each aggregator of the settings makes a vector of the tiles of each encoder of the settings. A row is made again if its tiles or
its aggregator changed, and removed if it has no tiles any more or its aggregator takes those of another encoder. Rows of
encoders and aggregators that the settings do not list stay as they are.
"""

import argparse
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs.runtime.run.cli import DONE, SLIDES_FAILED
from jobs.runtime.run.cli import main as run_main
from jobs.runtime.run.run import ORIGINS, Job, Run, check_licences
from jobs.runtime.run.slide_tiles import TilesOfSlide, tiles_of_slides
from jobs.runtime.run.summary import end_lines
from jobs.runtime.run.survey import plan_waves
from jobs.runtime.settings.config import Config, ConfigError
from jobs.runtime.settings.identity import row_hash
from jobs.runtime.settings.withheld import described
from jobs.runtime.tables.catalog import is_in
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs.aggregate_tiles import (
    MAX_BAG_BYTES,
    STATES,
    TILES_OF_BAGS,
    VECTORS,
    VERSION,
    Of,
    aggregate_bag,
    finished_vectors,
    partial_states,
)
from udfs.wording import printable
from udfs.wsi.aggregator.aggregator import Aggregator, AggregatorSpec, StreamingAggregator, load_aggregator
from udfs.wsi.store import public_uri, read_bytes, redact, secrets_of
from udfs.wsi.weights.checkpoint import CheckpointError
from udfs.wsi.weights.hub import is_of_hub
from udfs.wsi.weights.sources import absolute_source

JOB = Job("vectors", reads=("features",), writes=("slide_vectors", "patient_vectors"), result="slide_vectors")
_TABLE_OF: dict[Of, str] = {"image_id": "slide_vectors", "patient_id": "patient_vectors"}
_SLIDES_A_WAVE = 512  # committed at once, unless run.wave_slides says otherwise
LoadedAggregators = Mapping[str, tuple[AggregatorSpec, Aggregator]]  # by name
_log = logging.getLogger("slidelake.vectors")


class VectorKey(NamedTuple):
    """The key of a row of either table; `of` is an image_id or a patient_id."""

    of: str
    encoder: str
    aggregator: str


class VectorRow(NamedTuple):
    """What tells whether a row is today's, and whose it is."""

    patient_id: str
    n_tiles: int
    params_hash: str | None  # None: it cannot be made before the features job has ended


@dataclass(frozen=True)
class Changes:
    """What a run changes in one of the tables."""

    due: dict[VectorKey, VectorRow] = field(default_factory=dict)  # rows to make, those that replace one included
    replaced: dict[VectorKey, VectorRow] = field(
        default_factory=dict
    )  # those that are made again; rows that are removed

    def of_patients(self, patients: Sequence[str]) -> "Changes":
        """Return the part that concerns some patients, and no other."""
        among = set(patients)
        return Changes(
            *({key: row for key, row in rows.items() if row.patient_id in among} for rows in (self.due, self.replaced))
        )

    @property
    def patients(self) -> Counter[str]:
        """The number of changes by patient."""
        return Counter(row.patient_id for row in (self.due | self.replaced).values())


def aggregate(run: Run, arguments: argparse.Namespace) -> int:
    """Bring both tables up to date. Returns the exit status."""
    del arguments
    config, tables, record = run.config, run.tables, run.record
    with run.progress.stage("plan"):
        aggregators = load_all(config)
        if not tables.exists("features"):
            raise ConfigError(f"no table features in {public_uri(tables.root)}: run the features job first")
        check_licences(run.config, run.origins)
        run.progress.step("tiles of the slides")
        tiles = tiles_of_slides(tables, list(config.encoders))
        lacking = [name for name in config.encoders if name not in {each.encoder for each in tiles}]
        record.problems += [
            f"encoder {name} has no rows in table features: run the features job, then this again" for name in lacking
        ]
        if waiting := {each.image_id for each in tiles if each.digest is None}:
            record.problems.append(f"{len(waiting)} slides wait for the features job: run it, then this again")
        dims = _dims(tables, aggregators, {each.encoder for each in tiles})
        changes: dict[Of, Changes] = {}
        have: dict[Of, dict[VectorKey, VectorRow]] = {}
        origins = {ORIGINS: json.dumps(run.origins, sort_keys=True)} if run.origins else {}
        for of, table in _TABLE_OF.items():
            tables.create(table, origins)
            wanted = wanted_rows(tiles, aggregators, of)
            have[of] = _rows_now(tables, of, set(config.encoders), aggregators)
            changes[of], too_large = changes_of(wanted, have[of], most_tiles(aggregators, dims))
            record.problems += [_why_too_large(key, row, dims) for key, row in too_large.items()]
        effort = sum((each.patients for each in changes.values()), Counter())
        slides = Counter(each.patient_id for each in tiles)
        of_patient = {patient: float(max(1, slides[patient])) for patient in effort}
        waves = plan_waves(of_patient, config.run.wave_slides or _SLIDES_A_WAVE)
    with run.progress.waves(int(sum(of_patient.values())), len(waves)):
        for patients in waves:
            run.progress.wave(int(sum(of_patient[patient] for patient in patients)))
            with run.progress.stage("vectors"):
                _write(run, aggregators, {of: each.of_patients(patients) for of, each in changes.items()})
    for of, table in _TABLE_OF.items():
        removed = changes[of].replaced.keys() - changes[of].due.keys()
        record.counts[f"{table}_written"] = len(changes[of].due)
        record.counts[f"{table}_removed"] = len(removed)
        record.counts[table] = len((have[of].keys() | changes[of].due.keys()) - removed)
    print("\n".join(_summary(run, aggregators)))
    for line in record.problems:
        _log.warning(printable(f"slidelake: {line}"))
    return SLIDES_FAILED if record.problems and config.on_failed_slides == "report" else DONE


def wanted_rows(tiles: Iterable[TilesOfSlide], aggregators: LoadedAggregators, of: Of) -> dict[VectorKey, VectorRow]:
    """Return the rows that a table should have for the tiles that there are."""
    bags: dict[tuple[str, str], list[TilesOfSlide]] = defaultdict(list)
    for each in tiles:
        bags[getattr(each, of), each.encoder].append(each)
    rows = {}
    for (name, encoder), slides in bags.items():
        n_tiles, parts = sum(each.n_tiles for each in slides), sorted(slides)
        for aggregator, (spec, loaded) in aggregators.items():
            if spec.encoder in (None, encoder):
                waits = any(each.digest is None for each in slides)
                params_hash = None if waits else row_hash(VERSION, loaded.identity, parts)
                rows[VectorKey(name, encoder, aggregator)] = VectorRow(parts[0].patient_id, n_tiles, params_hash)
    return rows


def changes_of(
    wanted: Mapping[VectorKey, VectorRow], have: Mapping[VectorKey, VectorRow], most: Mapping[tuple[str, str], int]
) -> tuple[Changes, dict[VectorKey, VectorRow]]:
    """Return what changes in a table, and the rows that would need too large a bag.

    An existing row that would need one, or that waits for the features job, stays as it is. One that is made again counts to
    the patient whose it becomes: it is replaced in one wave, even if its slide moved to another patient.

    Args:
        wanted: the rows that there should be.
        have: the rows that there are.
        most: the most tiles of a bag, by encoder and aggregator; none: any number.
    """
    differ = {
        key: row
        for key, row in wanted.items()
        if row.params_hash is not None and (key not in have or have[key].params_hash != row.params_hash)
    }
    large = {key: row for key, row in differ.items() if row.n_tiles > most.get(key[1:], row.n_tiles)}
    due = {key: row for key, row in differ.items() if key not in large}
    replaced = {key: due.get(key, row) for key, row in have.items() if key in due or key not in wanted}
    return Changes(due, replaced), large


def most_tiles(aggregators: LoadedAggregators, dims: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Return the most tiles of a bag by (encoder, aggregator), for aggregators that take whole bags."""
    whole = [name for name, (_, loaded) in aggregators.items() if not isinstance(loaded, StreamingAggregator)]
    return {(encoder, name): MAX_BAG_BYTES // (4 * dim) for encoder, dim in dims.items() for name in whole}


def load_all(config: Config) -> dict[str, tuple[AggregatorSpec, Aggregator]]:
    """Return the aggregators of the settings by name.

    Raises:
        ConfigError: an encoder is not in section encoders, or weights cannot be read or do not fit.
    """
    loaded = {}
    for name, settings in config.aggregators.items():
        if settings.encoder is not None and settings.encoder not in config.encoders:
            known = ", ".join(config.encoders)
            raise ConfigError(
                f"aggregators.{name}: encoder {described(settings.encoder)} is not in section encoders: {known}"
            )
        weights = settings.weights and absolute_source(settings.weights)
        spec = AggregatorSpec(name, settings.method or name, weights, settings.encoder)
        try:
            aggregator = load_aggregator(spec, config.slides.storage_options)
        except CheckpointError as error:
            raise ConfigError(f"aggregators.{name}: {error}") from None
        loaded[name] = replace(spec, encoder=_encoder_of(spec, config)), aggregator
    return loaded


def _encoder_of(spec: AggregatorSpec, config: Config) -> str | None:
    """The encoder whose tiles an aggregator takes, None for all: of a model of job train, the encoder that it learned from.

    Raises:
        ConfigError: the model's card cannot be read, or the model learned from other vectors than those that it would get.
    """
    folder, _, file = (spec.weights or "").rpartition("/")
    if file != "model.safetensors" or is_of_hub(f"{folder}/{file}"):
        return spec.encoder
    uri, options = f"{folder}/model.json", config.slides.storage_options
    try:
        card = json.loads(read_bytes(uri, options))
    except FileNotFoundError:  # not of job train, or copied without its card: the tensors alone say what it is
        return spec.encoder
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, options))
        raise ConfigError(
            f"aggregators.{spec.name}: {public_uri(uri)} beside the weights cannot be read ({text})",
            "let it be read, or give weights that are not of job train another name than model.safetensors",
        ) from None
    if not isinstance(card, dict) or "columns" not in card:  # of other software
        return spec.encoder
    columns: Sequence[str] = card["columns"]
    encoder: str | None = card.get("encoder", spec.encoder)
    learned = f"aggregators.{spec.name}: the model in {public_uri(folder)} learned from"
    if columns != ["embeddings"]:
        remedy = "give a model that was trained with training.columns=embedding"
        raise ConfigError(f"{learned} {columns} of table patients, and vectors are made of embeddings", remedy)
    if encoder != spec.encoder and (spec.encoder or encoder not in config.encoders):
        remedy = f"set aggregators.{spec.name}.encoder to {encoder}, and have it in section encoders"
        raise ConfigError(
            f"{learned} encoder {encoder}, and not from {spec.encoder or ', '.join(config.encoders)}", remedy
        )
    return encoder


def _dims(tables: Tables, aggregators: LoadedAggregators, encoders: Iterable[str]) -> dict[str, int]:
    """Numbers of an embedding by encoder, of those from which an aggregator takes whole bags.

    Raises:
        ConfigError: an aggregator takes embeddings of another size.
    """
    whole = {name: each for name, each in aggregators.items() if not isinstance(each[1], StreamingAggregator)}
    dims = {}
    for encoder in sorted(encoders):
        taken = {name: loaded for name, (spec, loaded) in whole.items() if spec.encoder in (None, encoder)}
        if not taken:
            continue
        rows = tables.read("features").where(F.col("encoder") == encoder)
        dims[encoder] = dim = int(rows.select(F.size("embedding")).limit(1).collect()[0][0])
        for name, loaded in taken.items():
            if loaded.input_dim not in (None, dim):
                raise ConfigError(
                    f"aggregators.{name}: its weights take embeddings of {loaded.input_dim:,} numbers, and those of encoder "
                    f"{encoder} have {dim:,}",
                    f"set aggregators.{name}.encoder to the encoder that the weights were trained with",
                )
    return dims


def _rows_now(tables: Tables, of: Of, encoders: set[str], aggregators: LoadedAggregators) -> dict[VectorKey, VectorRow]:
    """The existing rows of encoders and aggregators that the settings list."""
    rows = tables.read(_TABLE_OF[of]).select(of, "encoder", "aggregator", "patient_id", "n_tiles", "params_hash")
    found = ((VectorKey(*row[:3]), VectorRow(*row[3:])) for row in rows.collect())
    return {key: row for key, row in found if key.encoder in encoders and key.aggregator in aggregators}


def _why_too_large(key: VectorKey, row: VectorRow, dims: Mapping[str, int]) -> str:
    n_bytes = 4 * dims[key.encoder] * row.n_tiles
    return (
        f"aggregator {key.aggregator} makes no vector of {key.of}: it takes the whole bag, and {row.n_tiles:,} tiles of encoder "
        f"{key.encoder} are {n_bytes:,} bytes, the limit is {MAX_BAG_BYTES:,}. Set tiling.max_tiles_per_patient"
    )


def _write(run: Run, aggregators: LoadedAggregators, changes: Mapping[Of, Changes]) -> None:
    """Make and remove the rows of one wave; one commit to each table that changes."""
    spark, tables = run.spark, run.tables
    due = [key for each in changes.values() for key in each.due]
    patients = sorted({row.patient_id for each in changes.values() for row in each.due.values()})
    specs = [aggregators[name] for name in sorted({key.aggregator for key in due})]
    streaming = [spec for spec, loaded in specs if isinstance(loaded, StreamingAggregator)]
    whole = [spec for spec, loaded in specs if not isinstance(loaded, StreamingAggregator)]
    identities = {spec.name: aggregators[spec.name][1].identity for spec in whole}
    features = tables.read("features").where(F.col("patient_id").isin(patients))
    features = features.where(F.col("encoder").isin(sorted({key.encoder for key in due}))).select(*TILES_OF_BAGS)
    states = features.mapInArrow(partial_states(streaming), spark_schema(STATES)).persist(StorageLevel.DISK_ONLY)
    schema = spark_schema(VECTORS)
    for of, change in changes.items():
        table = _TABLE_OF[of]
        if not change.due and not change.replaced:
            continue
        run.progress.step(f"{table}, {len(change.due):,} rows")
        vectors = spark.createDataFrame([], schema)
        if any(aggregators[key.aggregator][0] in streaming for key in change.due):
            grouped = states.groupBy(of, "encoder", "aggregator")
            vectors = vectors.unionByName(grouped.applyInArrow(finished_vectors(streaming, of), schema))
        bags = {(key.of, key.encoder) for key in change.due if aggregators[key.aggregator][0] in whole}
        if bags:
            wanted = F.broadcast(spark.createDataFrame(sorted(bags), f"{of} string, encoder string"))
            grouped = features.join(wanted, [of, "encoder"], "left_semi").groupBy(of, "encoder")
            pooled = aggregate_bag(whole, of, identities, run.config.slides.storage_options)
            vectors = vectors.unionByName(grouped.applyInArrow(pooled, schema))
        tables.replace(table, _checked(run, vectors, change, of), _where(change, of))
    states.unpersist()


def _checked(run: Run, vectors: DataFrame, change: Changes, of: Of) -> DataFrame:
    """The vectors that are due with what else a row has; another number of tiles than planned ends the run."""
    columns = f"{of} string, encoder string, aggregator string, wanted_tiles int, params_hash string, run_id string"
    due = [(*key, row.n_tiles, row.params_hash, run.record.run_id) for key, row in change.due.items()]
    counted = F.expr(
        "if(n_tiles = wanted_tiles, n_tiles, raise_error(concat(encoder, ': ', n_tiles, ' feature rows for ', wanted_tiles, "
        f"' of ', {of}, ': run again')))"
    )
    rows = vectors.join(F.broadcast(run.spark.createDataFrame(due, columns)), [of, "encoder", "aggregator"])
    return rows.withColumn("n_tiles", counted.cast("int")).repartition(1)  # of a wave, a few MB


def _where(change: Changes, of: Of) -> str | None:
    """The rows that are written or removed, as an SQL condition; None if no row exists yet."""
    if not change.replaced:
        return None
    names: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in sorted(change.due.keys() | change.replaced.keys()):
        names[key[1:]].append(key.of)
    conditions = [
        f"{is_in('encoder', [encoder])} AND {is_in('aggregator', [aggregator])} AND {is_in(of, ids)}"
        for (encoder, aggregator), ids in names.items()
    ]
    return " OR ".join(f"({condition})" for condition in conditions)


def _summary(run: Run, aggregators: LoadedAggregators) -> list[str]:
    counts, root = run.record.counts, public_uri(run.config.output.root)
    made_by = (f"{name} ({', '.join(loaded.identity)})" for name, (_, loaded) in aggregators.items())
    lines = ["", f"slidelake vectors, run {run.record.run_id}", f"  encoders    {', '.join(run.config.encoders)}"]
    lines.append(f"  aggregators {', '.join(made_by)}")
    for table in _TABLE_OF.values():
        written, removed = counts[f"{table}_written"], counts[f"{table}_removed"]
        lines.append(f"  {table} has {counts[table]:,} rows, {written:,} written and {removed:,} removed in this run")
    place = json.dumps(f"{root}/{JOB.result}", ensure_ascii=False)  # as Python writes it
    return [*lines, *end_lines(run.record, root), f"  next      polars.read_delta({place}, use_pyarrow=True)"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    return run_main(JOB, aggregate, argv)


if __name__ == "__main__":
    sys.exit(main())
