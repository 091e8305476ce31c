"""Plans of runs on hardware that you do not have."""
