"""What the jobs share: settings, the cohort, the Spark session, tables and their plan, progress, the record of a run."""
