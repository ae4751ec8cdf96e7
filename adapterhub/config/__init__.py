"""The files that people edit, config.toml and adapterhub.toml, and the lock. Floor 1, manager."""
