"""The ``feature_discrimination`` metric; ``evaluate`` loads the file of the same name as a script."""
