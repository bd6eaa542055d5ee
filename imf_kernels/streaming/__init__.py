"""Streams of speech, solved block by block as their conditions arrive, many at once.

Under the streaming mask a solve of whole blocks never depends on later frames, at any Euler step.
So each step keeps keys, values and convolution inputs of its own of the frames so far, and every
frame is evaluated once a step, however the conditions are cut: the result is that of one solve of
the whole row under the streaming mask. For `CausalUNet` (CosyVoice2) and a causal `DiT`
(CosyVoice3), guided teachers and students alike::

    streams = Streams(student, "uniform", nfe=2, frames=3000, streams=4)
    with streams.open(1500, spks=spks, noise=torch.Generator(), prompt=prompt) as stream:
        for mu in features:  # of the prompt's frames first
            stream.feed(mu)
            play(stream.drain())
        stream.finish()
        play(stream.drain())

A server feeds its streams, calls `streams.step()` while there is work, and takes what is finished.
`TokenStream(encoder, stream)` takes speech tokens instead of features.
"""

from imf_kernels.streaming.frames import Full, Stream, Streams
from imf_kernels.streaming.tokens import TokenStream

__all__ = ["Full", "Stream", "Streams", "TokenStream"]
