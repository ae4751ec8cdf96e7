"""The index of a hub in SQL, the only place with tables and migrations, and the registry's server. Only `adapterhub.opening` and
`adapterhub.cli.registry` import it."""
