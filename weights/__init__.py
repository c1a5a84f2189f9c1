"""Published checkpoints: records, retrieval, verification, reading and adaptation. No checkpoint file lives here."""
