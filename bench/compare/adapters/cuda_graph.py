"""The strongest plain baseline: a decode step in PyTorch, captured into one CUDA graph and replayed without a host's hand.

Replays follow one another on the GPU: each reads the token that the one before it chose, and the host looks only at the
end.  The second class compiles the step before it is captured, which fuses what lies between the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bench.compare.adapter import Adapter, LoadSpec

if TYPE_CHECKING:
    import numpy

BUCKET_STEP = 256  # attention reads the whole bucket, so there is a graph for every so many positions
WARM_UPS = 3  # before a capture, as PyTorch asks: libraries make their workspaces, a compiled step is compiled


class CudaGraph(Adapter):
    scoring = "decode step after prefill"
    compile_options: dict[str, Any] | None = None

    def load(self, spec: LoadSpec) -> None:
        import torch

        from bench.compare.adapters.graph_model import GraphModel
        from models.checkpoint import open_checkpoint
        from models.weights import Weights

        checkpoint = open_checkpoint(spec.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tensors = Weights.collect(checkpoint.source, torch.bfloat16).by_name
        capacity = rounded(spec.capacity)
        with torch.no_grad():
            self.model = GraphModel(checkpoint.config, tensors, capacity, device, spec.batch)
        self.step = self.model.step
        if self.compile_options is not None:
            self.step = torch.compile(self.step, fullgraph=True, dynamic=False, **self.compile_options)
        self.replays: dict[int, tuple[Callable[[], Any], Any]] = {}

    def settings(self) -> dict[str, str]:
        options = self.compile_options
        compiled = "no" if options is None else ", ".join(f"{key}={value!r}" for key, value in options.items())
        return {
            "graphs": f"one for every {BUCKET_STEP} positions, argmax inside, no host synchronisation between tokens",
            "attention": "scaled_dot_product_attention over the bucket, grouped queries folded",
            "compiled": compiled,
            "prefill": "eager",
        }

    def generate(self, prompt: Sequence[int], tokens: int, stream: bool) -> Iterator[list[int]]:
        yield self.generate_together([prompt] * self.model.batch, tokens)[0]

    def generate_together(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        import torch

        with torch.no_grad():
            positions = range(len(prompts[0]), len(prompts[0]) + tokens - 1)
            self._capture(positions)
            self.model.choose(self._prefill(prompts))
            for position in positions:
                self.replays[rounded(position + 1)][0]()
            found: list[list[int]] = self.model.history[:, :tokens].tolist()
            return found

    def distribution(self, prefix: Sequence[int]) -> numpy.ndarray:
        import torch

        with torch.no_grad():
            last = len(prefix) - 1
            self._capture(range(last, last + 1))
            self._prefill([prefix[:-1]] * self.model.batch)
            self.model.token.fill_(prefix[-1])
            replay, logits = self.replays[rounded(last + 1)]
            made = replay()
            return (made if logits is None else logits)[0].float().cpu().numpy()

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Any:
        import torch

        self.model.reset()
        return self.model.prefill(torch.tensor(prompts, device=self.model.device))

    def _capture(self, positions: range) -> None:
        """Make the graphs that these positions need.  Spoils the sequences."""
        for bucket in sorted({rounded(position + 1) for position in positions} - self.replays.keys()):
            self.model.reset()
            self.replays[bucket] = self._replay(bucket)

    def _replay(self, bucket: int) -> tuple[Callable[[], Any], Any]:
        """A function that decodes one token, and where it leaves the logits; without a GPU it returns them instead."""
        if self.model.device.type != "cuda":
            return lambda: self.step(bucket), None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # the split-KV kernel for few queries is the first of these
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return self._captured(bucket)

    def _captured(self, bucket: int) -> tuple[Callable[[], Any], Any]:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.step(bucket)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(bucket)
        return graph.replay, logits


class CompiledCudaGraph(CudaGraph):
    # no graphs from the compiler: the whole step is captured here, together with what chooses the next token
    compile_options: dict[str, Any] | None = {"mode": "max-autotune-no-cudagraphs"}


def rounded(length: int) -> int:
    """The bucket that holds `length` positions."""
    return -(-length // BUCKET_STEP) * BUCKET_STEP
