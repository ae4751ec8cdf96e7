"""What an adapter is and would do: explained, inspected, compared. Floor 5, runtime."""
