"""On record: journals, attempts, progress lines, energy meters, and MLflow filled from journals."""
