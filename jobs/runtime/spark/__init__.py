"""The Spark session, its executors, and how a run is stopped."""
