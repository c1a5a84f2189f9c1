"""imagenet runs."""
