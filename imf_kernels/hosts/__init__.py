"""Drop-ins for other people's code: the only place that knows their objects.

`hosts.f5_tts` for F5-TTS. A host is imported when it is wanted, and needs nothing of what it
stands in for.
"""
