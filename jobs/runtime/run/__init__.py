"""One run of a job: what there is to do, in which order, and the record that it leaves."""
