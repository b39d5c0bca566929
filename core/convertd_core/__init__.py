"""What daemon and client both mean: values, conditions, options, and their encoding."""
