"""Work over many fits and what it leaves: records, sweeps, tuning, plans, the report page, chat, and the training of the demo's model."""
