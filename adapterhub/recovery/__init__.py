"""A hub got back: repaired, rebuilt, backed up, restored. Floor 5, manager."""
