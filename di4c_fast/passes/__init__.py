"""The passes of each backend over a chunk of positions; the contract is in `base`."""
