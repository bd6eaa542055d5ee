"""espeak-ng through ctypes: text to audio and the sample at which every phoneme begins.

The shared library and its voices come inside the `espeakng-loader` wheel; no system package is
needed. espeak-ng keeps its state in globals: it is initialised once per process, and one lock
serialises all calls. Its output is not bit-reproducible: two renderings of one text differ by
some hundred samples in length and audibly little in spectrum, so never hash or compare audio.
"""

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS = 0x0001
_INITIALIZE_DONT_EXIT = 0x8000  # report missing data instead of ending the process
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_RATE, _PITCH = 1, 3
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7


class _EventId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True, slots=True)
class Speech:
    """One rendered text.

    Attributes:
        audio: `(samples,)` float32 in [-1, 1] at `sample_rate`.
        phonemes: `(start sample, espeak mnemonic)` in time order; "" marks a pause.
        sample_rate: Hz, the voice's own (22050 for every formant voice).
    """

    audio: np.ndarray
    phonemes: tuple[tuple[int, str], ...]
    sample_rate: int


class _Engine:
    """The process-wide espeak-ng instance; use `speak`, not this class."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "the quickstart corpus is spoken by espeak-ng, which comes with the demo extra: "
                "pip install '.[demo]'"
            ) from error
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        options = _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_DONT_EXIT
        self.sample_rate = library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), options
        )
        if self.sample_rate <= 0:
            raise RuntimeError(
                f"espeak-ng found no voice data in {data} (the path must be shorter than "
                f"160 characters, it has {len(str(data))})"
            )
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        self._library = library
        self._chunks: list[np.ndarray] = []
        self._phonemes: list[tuple[int, str]] = []
        self._callback = _Callback(self._collect)  # kept alive: espeak holds only the pointer
        library.espeak_SetSynthCallback(self._callback)

    def _collect(self, wav: Any, count: int, events: Any) -> int:
        """Keep one block of int16 samples and the phoneme events among its events."""
        if wav and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wav, (count,)).copy())
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            if events[index].type == _EVENT_PHONEME:
                name = events[index].id.string.decode("utf-8", "replace")
                self._phonemes.append((events[index].sample, name))
            index += 1
        return 0  # 0: go on; 1 would abort the synthesis

    def speak(self, text: str, voice: str, pitch: int, rate: int) -> Speech:
        self._chunks.clear()
        self._phonemes.clear()
        self._check(self._library.espeak_SetVoiceByName(voice.encode()), f"voice {voice!r}")
        self._check(self._library.espeak_SetParameter(_PITCH, pitch, 0), f"pitch {pitch}")
        self._check(self._library.espeak_SetParameter(_RATE, rate, 0), f"rate {rate}")
        raw = text.encode()
        status = self._library.espeak_Synth(
            raw, len(raw) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        self._check(status, f"text {text!r}")
        if not self._chunks:
            raise RuntimeError(f"espeak-ng returned no audio for text {text!r}")
        audio = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        phonemes = tuple(sorted(self._phonemes, key=lambda event: event[0]))
        return Speech(audio, phonemes, self.sample_rate)

    @staticmethod
    def _check(status: int, subject: str) -> None:
        if status != 0:
            raise RuntimeError(f"espeak-ng refused {subject} (status {status})")


_lock = threading.Lock()
_engine = functools.cache(_Engine)


def speak(text: str, voice: str = "en-us", pitch: int = 50, rate: int = 175) -> Speech:
    """Render `text`.

    Args:
        text: What to say.
        voice: espeak-ng voice name, with a variant after "+" ("en-us+f3").
        pitch: 0 to 99; 50 is the voice's own.
        rate: Words per minute, 80 to 450.
    """
    with _lock:
        return _engine().speak(text, voice, pitch, rate)
