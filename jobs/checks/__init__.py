"""What the job doctor looks at, a file a kind; no check writes anything that stays."""
