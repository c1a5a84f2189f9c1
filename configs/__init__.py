"""Training configurations, one file per run."""
