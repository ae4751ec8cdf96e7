"""The index of a hub in SQL. The only place with tables and migrations; only `adapterhub.open()` imports it."""
