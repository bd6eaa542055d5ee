"""The whole method on real audio, on a laptop: corpus, teacher, student, step search, report."""
