"""Object detection and instance segmentation on a pyramid of any backbone."""
