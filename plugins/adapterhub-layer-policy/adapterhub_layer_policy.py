"""Layer policies for adapterhub: freeze below, layer-wise rates, re-initialised top layers (Tinn et al., 2023)."""
