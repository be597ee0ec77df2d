"""What a run leaves on disk, and what is measured of it."""
