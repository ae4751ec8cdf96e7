"""What one hub folder holds: blobs, the protocol of its index, its releases. Floor 3, manager."""
