"""What an adapter is and what it would do: programs, explanations, sites, differences, bills of materials."""
