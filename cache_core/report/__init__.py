"""What a run tells: the record of each model call, advice, the report."""
