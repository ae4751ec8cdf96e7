"""Reinforced fine-tuning for adapterhub: PPO against a verifier (Luong et al., 2024)."""
