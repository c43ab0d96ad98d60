"""The report of a run: one HTML file, made only from the run's files."""
