"""What train, predict and users' own loops share: no Spark and no JVM."""
