"""Models of a patient, from packed bags to probabilities: what they are, how they are fitted and judged, where they are kept."""
