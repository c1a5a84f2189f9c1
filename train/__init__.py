"""Training on mmengine's Runner: model wrappers, data, metrics and hooks."""
