"""Corpora: documents from files and hubs, pictures, and how tokens are packed into sequences."""
