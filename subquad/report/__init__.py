"""From records to something to look at: one HTML page, its charts and tables, and a still picture of a comparison."""
