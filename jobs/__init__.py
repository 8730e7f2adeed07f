"""One file a job, named by the table it writes; preprocess runs slides, features and patients; runtime/ is what they share."""
