"""What is said about edits: metrics, contact sheet, report."""
