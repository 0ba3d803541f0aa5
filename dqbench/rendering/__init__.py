"""A paper's tables with published numbers beside ours: Markdown, LaTeX, CSV and one HTML page."""
