"""Keys, signatures, and whom the user believes. Floor 3, manager."""
