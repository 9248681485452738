"""Where a number that cannot be right comes from: every layer looked at while an iteration runs."""
