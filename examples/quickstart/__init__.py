"""The whole method on espeak-ng's speech, on a laptop: corpus, teacher, student, search, report."""
