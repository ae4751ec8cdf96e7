"""What one hub folder holds: blobs by sha256, the protocol of its index, and its releases."""
