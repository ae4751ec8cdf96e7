"""Bytes on disk, safely: the only writer of files, bounded readers, locks, progress."""
