"""What a command or study leaves: its record, sweeps, the report page."""
