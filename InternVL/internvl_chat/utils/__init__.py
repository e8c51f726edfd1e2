"""Domain-independent helpers: errors, logging, files, HTML and Markdown, distributed communication."""
