"""The patient CSV and the files that its rows name."""
