"""CorDA for adapterhub: low-rank adapters that start from an oriented decomposition of the weights (Yang et al., 2024)."""
