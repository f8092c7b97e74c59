"""What a run looks like to people: pictures, tables, and one HTML page."""
