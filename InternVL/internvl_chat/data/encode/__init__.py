"""Encode records: conversations to token ids and labels, images to tiles."""
