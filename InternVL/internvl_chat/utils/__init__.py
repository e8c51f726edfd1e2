"""Helpers without domain knowledge: errors, logging, files, HTML and Markdown, distributed communication."""
