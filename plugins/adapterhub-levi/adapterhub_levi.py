"""LEVI for adapterhub: a layer-wise ensemble of the base with a small task model (Roh et al., 2024)."""
