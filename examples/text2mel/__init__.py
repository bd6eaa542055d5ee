"""The F5 side of the method on the quickstart's audio: text spread over a duration, infilling."""
