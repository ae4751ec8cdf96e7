"""Convolution adapters and soft mixtures of adapters for adapterhub (Cappellazzo et al., 2024)."""
