"""What several commands share: cost and quality, the machine, tables, and the reading of command lines."""
