"""demo runs."""
