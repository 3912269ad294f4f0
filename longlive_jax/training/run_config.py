"""Settings that every stage has: of the optimiser, and of how a run goes."""

from __future__ import annotations

import dataclasses

from longlive_jax.config import unknown_name
from longlive_jax.errors import raise_all

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


def require(faults: list[str], fine: bool, message: str) -> None:
    if not fine:
        faults.append(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and what surrounds it. The learning rate is the phase's.

    Attributes:
      kind: "adamw" (the reference's); or "muon", which learns the matrices of a transformer's blocks by orthogonalised
        momentum (0.95) and everything else by AdamW with Nesterov's momentum, at one rate.
      b1: decay of the first moment; at 0 it is the gradient itself and AdamW does not keep it (Muon does).
      b2: decay of the second moment.
      eps: of AdamW.
      weight_decay: of all parameters, times the learning rate.
      clip: largest global norm of a gradient; 0 for no limit.
      warmup: steps in which the rate rises from 0.
      final_rate: the rate falls to this along a cosine; None for a constant rate.
      ema: decay of the averaged weights, which are what a run hands on; 0 for none.
      ema_start: updates before which the average is the weights themselves.
      spike: updates with a gradient norm above this many times the usual are skipped; 0 for no limit.
    """

    kind: str = "adamw"
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 100
    final_rate: float | None = None
    ema: float = 0.998
    ema_start: int = 0
    spike: float = 0.0

    def __post_init__(self):
        faults = []
        require(faults, self.kind in OPTIMIZERS, f"kind is {self.kind!r}; {' or '.join(OPTIMIZERS)} are allowed")
        for name in ("b1", "b2", "ema"):
            require(faults, 0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}; from 0 to below 1")
        for name in ("weight_decay", "clip", "warmup", "ema_start", "spike"):
            require(faults, getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; 0 or more is allowed")
        require(faults, self.eps > 0, f"eps is {self.eps}; it must be above 0")
        raise_all(faults, "optimizer: ")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a stage is run, whatever it trains.

    Attributes:
      seed: of initial weights, data and noise.
      streams: independent parts of a batch, each with its own noise. The devices of a mesh take one each at a time, so
        numbers depend on this and not on the mesh. More streams than devices: gradients are accumulated.
      data: mesh axis of copies.
      fsdp: mesh axis over which parameters and optimiser states are cut up.
      dtype: of activations; weights, their gradients' sums and optimiser states are float32 always.
      unroll: write out the loop over a transformer's layers: less time a step for small networks on a CPU, twice the
        time to compile.
      save_every: steps between checkpoints of the run.
      keep: how many of them stay.
      log_every: steps between lines of metrics.
      validate_every: steps between validation videos; 0 for one at the end of each phase.
      minutes: stop after this long, with a checkpoint to go on from.
      workers: processes that draw data; 0 for two threads (of grain, where that is installed).
      split_every: steps between timing passes, which run the parts of a step (rollout, teacher ...) apart; 0 for none.
        A pass takes about as long as a step in which the student learns. The first, at the start of the run, also
        compiles every part: half as long as the step's own program (seen at the sizes of `--smoke`, on a CPU).
      device_gib: memory of a device, to check a run for other machines; None for what this one has.
      device_tflops: peak of one device in `dtype`, in 10^12 FLOP/s, for the figure `mfu`; None for that of known
        devices in bfloat16 (`flops.PEAKS`), without which there is no such figure.
      max_skips: updates skipped in a row before the run gives up.
      tensorboard: write TensorBoard files where tensorboardX is installed.
      wandb: Weights & Biases project to log to.
    """

    seed: int = 0
    streams: int = 1
    data: int = 1
    fsdp: int = 1
    dtype: str = "float32"
    unroll: bool = False
    save_every: int = 200
    keep: int = 2
    log_every: int = 20
    validate_every: int = 0
    minutes: float | None = None
    workers: int = 0
    split_every: int = 0
    device_gib: float | None = None
    device_tflops: float | None = None
    max_skips: int = 20
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self):
        faults = []
        for name in ("streams", "data", "fsdp", "save_every", "keep", "log_every", "max_skips"):
            require(faults, getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; 1 or more is needed")
        for name in ("seed", "validate_every", "workers", "split_every"):
            require(faults, getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; 0 or more is allowed")
        for name in ("minutes", "device_gib", "device_tflops"):
            value = getattr(self, name)
            require(faults, value is None or value > 0, f"{name} is {value}; above 0 is needed")
        if self.dtype not in DTYPES:
            faults.append(unknown_name("dtype", self.dtype, DTYPES))
        if min(self.streams, self.data, self.fsdp) >= 1:
            require(
                faults, self.streams % self.devices == 0,
                f"streams is {self.streams}, which a mesh of data {self.data} x fsdp {self.fsdp} = {self.devices} "
                f"devices does not divide; make it a multiple of {self.devices}",
            )  # fmt: skip
        raise_all(faults, "run: ")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp


HARMLESS = (
    "data", "fsdp", "save_every", "keep", "log_every", "validate_every", "minutes", "workers", "split_every",
    "device_gib", "device_tflops", "max_skips", "tensorboard", "wandb",
)  # fmt: skip
"""Fields of `RunConfig` that may differ when a run goes on: they change no number (a mesh the order of sums only)."""
