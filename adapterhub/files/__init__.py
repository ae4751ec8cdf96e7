"""Bytes on disk: the only writer of files, bounded readers, locks, progress bars. Floor 1, manager."""
