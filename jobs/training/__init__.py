"""What splits, train, predict and users' own loops share: the feed, the model, metrics. No Spark, no JVM."""
