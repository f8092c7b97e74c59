"""A page in the browser: a student and its teacher side by side."""
