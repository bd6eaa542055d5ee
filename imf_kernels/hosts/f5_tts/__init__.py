"""F5-TTS: a host with the surface of its `CFM`, from a checkpoint or from a live object."""

from imf_kernels.hosts.f5_tts.host import F5TTS
from imf_kernels.hosts.f5_tts.live import apply_to, from_host, restore
from imf_kernels.hosts.f5_tts.stored import from_checkpoint, from_student

__all__ = ["F5TTS", "apply_to", "from_checkpoint", "from_host", "from_student", "restore"]
