"""Get a hub back: repair it, rebuild a lost index, write a backup and restore one."""
