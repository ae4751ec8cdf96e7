"""LoReFT (being written)."""
