"""Files that people edit, config.toml and adapterhub.toml, and the lock."""
