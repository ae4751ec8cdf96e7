"""The unified view for adapterhub: adapters by their four axes, and MAM (He et al., 2022)."""
