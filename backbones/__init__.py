"""Model families, one file each, over the contract in `base`."""
