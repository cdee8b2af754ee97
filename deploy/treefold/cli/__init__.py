"""The `treefold` command: the one place that prints."""
