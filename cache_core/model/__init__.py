"""What is known of a model: its chains of blocks and how they are found, hooks, attention, compilation."""
