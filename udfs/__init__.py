"""The functions that Spark runs on executors: one file a UDF factory, schemas.py for what they emit, wsi/ for the core."""
