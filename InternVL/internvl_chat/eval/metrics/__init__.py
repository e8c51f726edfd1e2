"""Measures of an answer against a reference: strings in, numbers from 0 to 1 out (CIDEr: from 0 to 10)."""
