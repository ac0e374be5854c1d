"""Tables, figures and pages, made from evidence files only."""
