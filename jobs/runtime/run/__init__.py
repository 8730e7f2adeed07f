"""One run of a job: what it has to do, in which order, and the record that it leaves."""
