"""Drop-ins for other people's code: the only place that knows their objects.

`hosts.f5_tts` for F5-TTS, `hosts.cosyvoice` for CosyVoice2 and 3. A host is imported when it is
wanted, and needs nothing of what it stands in for.
"""
