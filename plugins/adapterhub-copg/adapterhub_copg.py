"""Contrastive policy gradient for adapterhub (Flet-Berliac et al., 2024)."""
