"""General-purpose helpers: errors, logging, files, HTML and Markdown, distributed communication."""
