"""Other software's files: PEFT in and out. Floor 5, runtime."""
