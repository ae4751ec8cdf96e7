"""Editing with canonical examples for adapterhub: an objective with a drift budget, and edits carried to a larger model (Hewitt et al., 2024)."""
