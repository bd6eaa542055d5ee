"""The documents: pages, and the scripts of their figures."""
