"""From records to something to look at: one HTML page, its charts and tables, and a picture for the README."""
