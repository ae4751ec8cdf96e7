"""Who made a release, and whom the user believes: keys, signatures, policy, bill of materials. No torch."""
