"""Launch parameters of the selective scan's kernels."""
