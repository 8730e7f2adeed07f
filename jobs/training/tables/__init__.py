"""Delta tables and the stores that they lie in, as training reads and writes them: no Spark, no JVM."""
