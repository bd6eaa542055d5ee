"""Real-time factor of the flow module: from a request's tensors to its mel, `prepare` included.

    ours, eager             sampler.sample on the request's own shape
    ours, graph             GraphSampler on its default buckets
    ours, baked             the same of a student baked for the grid
    ours, fp8               the same in FP8, every layer
    plain                   the same weights in plain PyTorch (`benchmarks.plain`)
    torch.compile           that, compiled for this shape
    torch.compile, graph    that, the whole solve captured at this shape, inputs copied in and out:
                            what serving projects write by hand
    F5-TTS                  the client's own sampler, `f5-tts` of PyPI

All on one grid, the client's default at that NFE; from the call until the device has the result. An
error is that of the way from noise to mel, generated frames only: relative RMS against plain
PyTorch in float32. Rows with a vocoder go on to the waves: `vocos` of PyPI, where it is installed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import f5_client
from benchmarks.contest import Conditions, Contest, Row, Unavailable
from benchmarks.plain import Compiled, plain, plainly
from benchmarks.timing import Ceilings, Run, graphed
from benchmarks.workload import (
    PROMPT_SECONDS,
    SIZES,
    VOCABULARY,
    allowed,
    build,
    error,
    limit,
    request,
    work,
)
from imf_kernels import grids, guidance, sampler
from imf_kernels.graphs import DEFAULT, GraphSampler, bake
from imf_kernels.models import Conditioning, DiT, state_dicts
from imf_kernels.ops.fp8_linear import runs_on

F5_STRENGTH, COSYVOICE_RATE = 2.0, 0.7  # the clients' defaults


def rows(conditions: Conditions) -> list[Row]:
    def row(model: str, nfe: int, seconds: float = 10.0, **told: Any) -> Row:
        shape = {"model": model, "nfe": nfe, "guidance": False, "batch": 1, "seconds": seconds}
        return conditions.row(**shape | {"prompt": PROMPT_SECONDS} | told)

    return SELECTED[conditions.selection](row)


Maker = Callable[..., Row]


def on_cpu(row: Maker) -> list[Row]:
    """One second of audio; depths cut where whole models would take too long, and said to be."""
    short = functools.partial(row, seconds=1.0, prompt=0.5)
    cut = functools.partial(short, depth=4)
    return [
        *(short("f5_small", nfe) for nfe in (3, 1, 2)),
        short("f5_small", 3, vocoder="vocos"),
        short("f5_small", 32, guidance=True),
        cut("f5_base", 3),
        *(cut("cosyvoice2", nfe, depth=1) for nfe in (1, 3)),
        *(cut("cosyvoice2", nfe, depth=1, guidance=True) for nfe in (10, 32)),
        *(cut("cosyvoice3", nfe, depth=2) for nfe in (1, 3)),
        *(cut("cosyvoice3", nfe, depth=2, guidance=True) for nfe in (10, 32)),
        *(short("f5_small", nfe) for nfe in (7, 16)),
        row("f5_small", 3, 3.0, prompt=1.6),
        cut("f5_base", 3, batch=4),
    ]


def on_gpu(row: Maker) -> list[Row]:
    return [
        row("f5_base", 3),
        row("f5_base", 32, guidance=True),
        *(row("f5_base", nfe) for nfe in (1, 2)),
        row("f5_base", 3, vocoder="vocos"),
        row("f5_base", 32, guidance=True, vocoder="vocos"),
        row("f5_base", 3, 1.0, prompt=0.0),
        *(row("f5_base", 3, seconds) for seconds in (1.0, 3.0, 30.0)),
        *(row("f5_base", 3, batch=batch) for batch in (4, 16)),
        *(row("cosyvoice2", nfe) for nfe in (1, 3)),
        *(row("cosyvoice2", nfe, guidance=True) for nfe in (10, 32)),
        *(row("cosyvoice3", nfe) for nfe in (1, 3)),
        *(row("cosyvoice3", nfe, guidance=True) for nfe in (10, 32)),
        *(row("f5_base", nfe) for nfe in (7, 16)),
        row("f5_small", 3),
        row("f5_small", 32, guidance=True),
    ]


def full(row: Maker) -> list[Row]:
    models = "f5_base", "f5_small", "cosyvoice2", "cosyvoice3"
    nfes, batches, lengths = (1, 2, 3, 7, 10, 16, 32), (1, 4, 16), (1.0, 3.0, 10.0, 30.0)
    mels = [
        row(model, nfe, seconds, guidance=guided, batch=batch)
        for model, nfe, guided, batch, seconds in itertools.product(
            models, nfes, (False, True), batches, lengths
        )
    ]
    return [*mels, *(row(model, 3, vocoder="vocos") for model in models[:2])]


def tiny(row: Maker) -> list[Row]:
    short = functools.partial(row, nfe=2, seconds=0.2, prompt=0.1)
    return [
        short("tiny"),
        short("tiny", guidance=True, batch=2),
        short("tiny_cosyvoice2"),
        short("tiny_cosyvoice3", guidance=True),
    ]


SELECTED = {"cpu": on_cpu, "gpu": on_gpu, "full": full, "tiny": tiny}


def compiles(row: Row, conditions: Conditions) -> bool:
    """Whether a row has torch.compile too, which takes a minute of every row."""
    if conditions.selection in ("full", "tiny"):
        return conditions.selection == "full" or (row["model"], row["guidance"]) == ("tiny", False)
    seconds = 10.0 if conditions.cuda else 1.0
    shape = row["model"], row["nfe"], row["guidance"], row["batch"], row["seconds"]
    return shape == ("f5_base", 3, False, 1, seconds) and "vocoder" not in row


class Models:
    """One model's weights in all the forms that a row needs, each made when it is asked for."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, depth: Any) -> None:
        self.fused, self.rate = build(name, device, dtype, depth)
        self.family = SIZES[name][0]

    @functools.cached_property
    def plain(self) -> Any:
        return plain(self.fused, masked=False)

    @functools.cached_property
    def exact(self) -> Any:
        single = self.fused.dtype == torch.float32
        return self.plain if single else plain(self.fused, masked=False).float()

    @functools.cached_property
    def fp8(self) -> DiT:
        return self.fused.fp8()

    @functools.cached_property
    def client(self) -> Any:
        """F5-TTS's `CFM` around a teacher with these weights."""
        try:
            found = f5_client.load()
        except ImportError as why:
            raise Unavailable(f"F5-TTS is not installed: {why}") from why
        config, tower = self.fused.config, self.fused.config.text
        sizes = {"dim": config.dim, "depth": config.depth, "heads": config.heads}
        text = {"text_dim": tower.dim, "conv_layers": tower.layers, "text_num_embeds": VOCABULARY}
        net = found.DiT(ff_mult=2, mel_dim=config.channels, **sizes, **text)
        weights = self.fused.state_dict()
        for name in filter(state_dicts.ours, list(weights)):
            del weights[name]
        missing, unexpected = net.load_state_dict(weights, strict=False)
        if unexpected or any("rotary" not in name for name in missing):
            raise ValueError(f"weights that are F5-TTS's, got {missing}, {unexpected}")
        cfm = found.CFM(transformer=net, mel_spec_kwargs={"n_mel_channels": config.channels})
        weight = next(self.fused.parameters())
        return cfm.to(weight.device, weight.dtype).eval()


models = functools.lru_cache(maxsize=1)(Models)


@functools.lru_cache(maxsize=1)
def vocoder(device: torch.device) -> torch.nn.Module:
    """Vocos at the sizes of F5-TTS's, with random weights: mels `(B, 100, N)` to waves."""
    try:
        from vocos.heads import ISTFTHead
        from vocos.models import VocosBackbone
    except (ImportError, OSError) as why:  # it needs a fitting torchaudio
        raise Unavailable(f"Vocos is not installed: {why}") from why
    with device:
        body = VocosBackbone(input_channels=100, dim=512, intermediate_dim=1536, num_layers=8)
        head = ISTFTHead(dim=512, n_fft=1024, hop_length=256, padding="center")
    return torch.nn.Sequential(body, head).eval().requires_grad_(False)


class Request(NamedTuple):
    noise: Tensor
    given: dict[str, Tensor]
    prompt: int
    grid: Tensor
    w: float | None

    @classmethod
    def of(cls, row: Row, found: Models) -> Request:
        f5 = found.family.startswith("f5")
        prompt = round(row["prompt"] * found.rate)
        frames = prompt + round(row["seconds"] * found.rate)
        noise, given = request(found.fused, row["batch"], frames, prompt)
        torch.manual_seed(0)  # as F5-TTS draws: every row from the seed, in the model's dtype
        one = torch.randn(frames, noise.shape[2], device=noise.device, dtype=found.fused.dtype)
        noise.copy_(one.expand_as(noise))
        grid = grids.epss(row["nfe"]) if f5 else grids.cosine(row["nfe"])
        strength = guidance.from_f5(F5_STRENGTH) if f5 else guidance.from_cosyvoice(COSYVOICE_RATE)
        return cls(noise, given, prompt, grid, strength if row["guidance"] else None)

    def solve(self, model: Any, prepared: Any = None) -> Tensor:
        """`prepared` in place of a model that cannot prepare."""
        cond = (prepared or model).prepare(**self.given, guided=self.w is not None)
        return sampler.sample(model, self.noise, cond, self.grid, guidance=self.w)

    def client(self, cfm: Any) -> Tensor:
        mel, _ = cfm.sample(
            self.given["prompt"][:, : self.prompt],
            self.given["text"],
            self.noise.shape[1],
            steps=len(self.grid) - 1,
            cfg_strength=0.0 if self.w is None else self.w - 1.0,
            sway_sampling_coef=-1.0,
            seed=0,
        )
        return mel.float()


def recipe(compiled: Any, plain: Any, asked: Request) -> Run:
    """A whole solve of the compiled model in one graph of this exact shape."""
    guided = asked.w is not None
    x, prepared = asked.noise.clone(), plain.prepare(**asked.given, guided=guided)
    static = Conditioning({name: t.clone() for name, t in prepared.items()}, prepared.specs)
    grid = asked.grid.to(x.device)
    replay = graphed(lambda: sampler.sample(compiled, x, static, grid, guidance=asked.w), x.device)

    def solve() -> Tensor:
        x.copy_(asked.noise)
        for name, tensor in plain.prepare(**asked.given, guided=guided).items():
            static[name].copy_(tensor)
        return replay().clone()

    return solve


@pytest.mark.rows(of=rows)
def test_rtf(row: Row, contest: Contest, ceilings: Ceilings) -> None:
    conditions, device = contest.conditions, contest.device
    speak = None
    if "vocoder" in row:
        try:
            speak = vocoder(device)
        except Unavailable as reason:
            contest.leave_out(None, str(reason))
            pytest.skip(str(reason))
    found = models(row["model"], device, conditions.dtype, row.get("depth"))
    asked = Request.of(row, found)
    truth = plainly(asked.solve)(found.exact)

    def far(mel: Tensor) -> float:
        way, true_way = ((end - asked.noise)[:, asked.prompt :] for end in (mel, truth))
        return error(way, true_way)

    single = conditions.dtype == torch.float32
    off = 0.0 if single else far(plainly(asked.solve)(found.plain))
    ours = 1e-4 if single else allowed(off)
    theirs = 1e-4 if single else 0.2  # of state and times in bfloat16
    branches = 1 + row["guidance"]
    audio = {"audio_seconds": row["batch"] * row["seconds"], "evaluations": row["nfe"] * branches}
    told: dict[str, Any] = dict(audio)
    if isinstance(found.fused, DiT) and "vocoder" not in row:
        lengths = [asked.noise.shape[1]] * row["batch"] * branches
        flops, nbytes = work(found.fused, lengths, row["nfe"])
        floor = limit(flops, nbytes, ceilings)
        told |= {"flops": flops, "bytes": nbytes, "floor_seconds": floor}
    buckets = DEFAULT if row["batch"] <= 8 else [(row["batch"], asked.noise.shape[1])]
    options: Any = {"guidance": asked.w, "buckets": buckets}

    def enter(name: str, make: Callable[[], Run], bound: float, role: str, **told: Any) -> None:
        def spoken() -> Run:
            run = make()

            def waves() -> Tensor:
                mel = run()
                speak(mel[:, asked.prompt :].transpose(1, 2))
                return mel

            return run if speak is None else waves

        contest.enter(name, spoken, lambda mel: (far(mel), bound), role=role, **told)

    with contextlib.ExitStack() as stack:
        graphs: dict[str, GraphSampler] = {}

        def graph(name: str, make: Callable[[], GraphSampler]) -> Callable[[], Run]:
            def made() -> Run:
                if not (conditions.cuda or conditions.tiny or name == "ours, baked"):
                    raise Unavailable("a CUDA graph needs CUDA")
                graphs[name] = stack.enter_context(make())
                return lambda: graphs[name].sample(asked.noise, conditions=asked.given)

            return made

        def fp8() -> GraphSampler:
            if not isinstance(found.fused, DiT):
                raise Unavailable("there is no CosyVoice2 in FP8")
            if not (runs_on(device) or conditions.tiny):
                raise Unavailable("the device has no products in FP8")
            return GraphSampler(found.fp8, row["nfe"], grid=asked.grid, **options)

        def baked() -> GraphSampler:
            if not isinstance(found.fused, DiT):
                raise Unavailable("a CosyVoice2 is not baked")
            if conditions.selection == "cpu" and row["nfe"] > 3:
                raise Unavailable("measured at 1 to 3 steps (full selection)")
            return bake(found.fused, [asked.grid], **options)

        def compiled() -> Any:
            if not compiles(row, conditions):
                raise Unavailable("compilation takes a minute (full selection)")
            return Compiled(found.plain, "eager" if conditions.tiny else "inductor")

        def compiled_graph() -> Run:
            if not (conditions.cuda or conditions.tiny):
                raise Unavailable("a CUDA graph needs CUDA")
            return plainly(plainly(recipe)(compiled(), found.plain, asked))

        def client() -> Run:
            if not found.family.startswith("f5"):
                raise Unavailable("F5-TTS has no such model")
            return functools.partial(asked.client, found.client)

        plain_solve = plainly(functools.partial(asked.solve, found.plain))
        enter("plain", lambda: plain_solve, theirs, "baseline", **told)
        eager = functools.partial(asked.solve, found.fused)
        enter("ours, eager", lambda: eager, ours, "ours", **told)
        samplers = {
            "ours, graph": lambda: GraphSampler(
                found.fused, row["nfe"], grid=asked.grid, **options
            ),
            "ours, baked": baked,
        }
        for name, make in samplers.items():
            enter(name, graph(name, make), ours, "ours", **told)
        # without a floor, which is of the row's dtype
        enter("ours, fp8", graph("ours, fp8", fp8), ours + 0.05, "ours", **audio)

        def compiled_solve() -> Run:
            return plainly(functools.partial(asked.solve, compiled(), found.plain))

        enter("torch.compile", compiled_solve, theirs, "peer", **told)
        enter("torch.compile, graph", compiled_graph, theirs, "peer", **told)
        enter("F5-TTS", client, theirs, "peer", **told)
        for name, held in graphs.items():
            stats = held.stats()
            contest.tell(name, captures=stats.captures, bytes_held=stats.bytes_held)
            if held.baked is not None:
                contest.tell(name, weight_bytes=held.baked.nbytes)
        contest.time()
