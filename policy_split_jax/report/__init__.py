"""One self-contained HTML page about a run, or several beside each other."""
