"""What a run reports: numbers, where the time went, profiles, validation images."""
