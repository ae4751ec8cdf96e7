"""Other software's files, read and written."""
