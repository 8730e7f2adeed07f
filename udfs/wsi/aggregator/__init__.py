"""The embeddings of a bag to one vector of a slide or patient, one file per aggregator."""
