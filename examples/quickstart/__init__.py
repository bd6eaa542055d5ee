"""The whole method on speech of espeak-ng, on a laptop: corpus, teacher, student, step search, report."""
