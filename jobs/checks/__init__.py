"""What the job doctor checks, one file per subject; no check leaves anything behind."""
