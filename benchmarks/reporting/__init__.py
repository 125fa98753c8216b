"""What experiments say: tables, claims, figures, RESULTS.md."""
