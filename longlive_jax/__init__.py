"""Real-time, interactive, long video generation in JAX: LongLive 1.0 on Wan 2.1.

from longlive_jax import LongLivePipeline

pipe = LongLivePipeline.from_pretrained("sprites")
pipe("a large red star drifts right over a night sky", seconds=5).save("star.mp4")
"""

from typing import TYPE_CHECKING

from longlive_jax.errors import UserError

if TYPE_CHECKING:
    from longlive_jax.pipeline import LongLivePipeline, Video
    from longlive_jax.prompts import Schedule
    from longlive_jax.sharding import make_mesh
    from longlive_jax.stream import VideoStream

__version__ = "0.1.0"
__all__ = ["LongLivePipeline", "Schedule", "UserError", "Video", "VideoStream", "make_mesh"]

_HOMES = {
    "LongLivePipeline": "longlive_jax.pipeline",
    "Schedule": "longlive_jax.prompts",
    "Video": "longlive_jax.pipeline",
    "VideoStream": "longlive_jax.stream",
    "make_mesh": "longlive_jax.sharding",
}


def __getattr__(name: str):
    """Public names are imported when they are asked for: `longlive --help` must not wait for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'longlive_jax' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
