"""Run with a metastore of its own: tables of output.schema, and what the catalog then has.

    python registered.py FOLDER

FOLDER/found.json gets what came of each thing that was tried.
"""

import json
import shutil
import sys
from pathlib import Path

from delta.tables import DeltaTable
from pyspark.sql import SparkSession

from jobs.runtime.settings.config import ConfigError
from jobs.runtime.spark.session import start_session
from jobs.runtime.tables.tables import Tables, spark_schema
from udfs import schemas


def refusal(spark: SparkSession, root: str) -> str:
    """Why the tables cannot be in the catalog."""
    try:
        Tables(spark, root, "lab").open("slides", "tiles")
    except ConfigError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """See above."""
    spark = start_session("registered")
    root = str(folder / "tables")
    tables = Tables(spark, root, "lab")
    found: dict[str, object] = {"no_schema": refusal(spark, root)}
    spark.sql("CREATE SCHEMA lab")
    older = (
        DeltaTable.create(spark).location(tables.path("tiles")).addColumns(spark_schema(schemas.TABLES["tiles"].schema))
    )
    older.execute()  # as they were before tables had comments
    for name in ("slides", "tiles"):
        tables.create(name)
    spark.sql(f"INSERT INTO delta.`{tables.path('slides')}` (image_id, patient_id) VALUES ('a1', '001')")
    found["rows"] = [tuple(row) for row in spark.sql("SELECT image_id, patient_id FROM lab.slides").collect()]
    about = {name: spark.sql(f"DESCRIBE TABLE EXTENDED lab.{name}").collect() for name in ("slides", "tiles")}
    found["comments"] = {
        name: [lines[0].comment, *(line.data_type for line in lines if line.col_name == "Comment")]
        for name, lines in about.items()
    }
    found["again"] = refusal(spark, root)
    spark.sql("DROP TABLE lab.slides")
    slides = DeltaTable.forPath(spark, tables.path("slides"))
    before = slides.history().count()
    tables.create("slides")
    found["found_again"] = [spark.table("lab.slides").count(), slides.history().count() - before]
    found["elsewhere"] = refusal(spark, f"{root}2")
    shutil.rmtree(root)
    found["gone"] = refusal(spark, root)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
