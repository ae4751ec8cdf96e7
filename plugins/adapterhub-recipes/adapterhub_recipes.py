"""Recipes for adapterhub: masked thought, response-only, cocktail mixing, semantic-preserve, NEFTune."""
