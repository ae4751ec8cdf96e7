"""Half fine-tuning for adapterhub: half of the parameters in each round (Hui et al., 2025)."""
