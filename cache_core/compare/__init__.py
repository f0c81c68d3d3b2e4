"""Pictures side by side: measures of likeness, the table, the sheet."""
